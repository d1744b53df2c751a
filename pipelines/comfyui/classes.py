"""Classes as text: the names that there are, and labels of what was typed."""

import json
import re

from .sources import pipeline_folders

# What reading a damaged or foreign model_index.json raises.
_DAMAGES = (OSError, ValueError, AttributeError, TypeError, RecursionError)


def class_names() -> list[str]:
    """Names of the classes of all pipelines that are found, each once, in the pipelines' order."""
    names = {}
    for folder in pipeline_folders().values():
        try:
            table = json.loads((folder / "model_index.json").read_text()).get("id2label") or {}
            names |= dict.fromkeys(table[number] for number in sorted(table, key=int))
        except _DAMAGES:  # which Load will name
            continue
    return [name for name in names if isinstance(name, str) and name.strip()]


def parse_classes(text: str) -> list[int | str | None]:
    """Labels by a text: names and numbers, split at semicolons and line ends; numbers at commas as well.

    Commas do not split names, which have some ("crane, bird"). What is in quotes is a name, whatever it
    holds. An empty text is the null class.
    """
    labels = []
    for quoted, plain in re.findall(r'[^\S\n]*"([^"\n]+)"[^\S\n]*(?=[;\n]|$)|([^;\n]+)', text):
        part = plain.strip()
        numbers = [number.strip() for number in part.split(",")]
        if quoted:
            labels.append(quoted)
        elif all(number.isdecimal() for number in numbers):
            labels += [int(number) for number in numbers]
        elif part:
            labels.append(part)
    return labels or [None]


def quoted_where_needed(name: str) -> str:
    """A class's name as [`parse_classes`] takes it for one: in quotes if it is a number or has semicolons."""
    return name if parse_classes(name) == [name] else f'"{name}"'
