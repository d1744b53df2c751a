"""What every program asks of its command line: options that know what they may be, one line for a mistake."""

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import NamedTuple

from transformers import HfArgumentParser

_MOST = 2**31 - 1  # of whole numbers that have no limit of their own
MOST_WIDTH = 2**16  # of a layer, of a picture


class Limits(NamedTuple):
    """What a setting may be."""

    low: float | None = None
    high: float | None = None
    choices: Collection[str] = ()  # such as the keys of a table, to which rows may be added
    infinite: bool = False  # whether infinity is a value

    def problem(self, value) -> str:
        """What a value must be and is not; empty where all is well."""
        if self.choices and value not in self.choices:
            *others, last = (repr(choice) for choice in self.choices if choice)  # '' is "not given"
            return f"it must be {', '.join(others)}{' or ' * bool(others)}{last}"
        if isinstance(value, str):
            return "text has no null bytes" if "\0" in value else ""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        if not math.isfinite(value) and not (self.infinite and math.isinf(value)):
            return f"it must be {self._range or 'a finite number'}"
        most = _MOST if self.high is None and isinstance(value, int) else math.inf
        if abs(value) > most:
            return f"it must be at {f'most {most}' if value > 0 else f'least {-most}'}"
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return "" if low <= value <= high else f"it must be {self._range}"

    @property
    def _range(self) -> str:
        if self.low is not None and self.high is not None:
            return f"in {self.low}..{self.high}"
        return f"at least {self.low}" if self.low is not None else f"at most {self.high}" if self.high else ""


def option(default, help: str, **limits):
    """A field of a program's settings, with what `--help` says of it and its [`Limits`]."""
    return field(default=default, metadata={"help": help, "limits": Limits(**limits)})


def options(default: list, help: str, **limits):
    """An option of several values, each of which keeps to the limits."""
    return field(default_factory=default.copy, metadata={"help": help, "limits": Limits(**limits)})


def check_options(config) -> None:
    """Holds each setting of a dataclass of [`option`]s against its limits.

    Raises:
        ValueError: a value that makes no sense; the message has its name and what is allowed.
    """
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        for one in value if isinstance(value, list) else [value]:
            if problem := setting.metadata.get("limits", Limits()).problem(one):
                raise ValueError(f"{setting.name} is {shortened(one)}; {problem}.")


def shortened(value, most: int = 80) -> str:
    """A foreign value for a message: on one line, and not longer than a message should be."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        shown = "a very large number"
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def json_object(name: str, text: str) -> dict:
    """The value of an option that is a JSON object.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {shortened(text)}, which is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shortened(text)}; it must be a JSON object.")
    return value


class Parser(HfArgumentParser):
    """One line for a mistake, instead of the usage of fifty options."""

    def add_argument(self, *names, limits: Limits | None = None, **arguments):
        """As in argparse; the limits of an [`option`] are held by `check_options`, from files too."""
        return super().add_argument(*names, **arguments)

    def add_argument_group(self, *names, **arguments):
        """As in argparse; the same holds for a group's options."""
        group = super().add_argument_group(*names, **arguments)
        add = group.add_argument
        group.add_argument = lambda *names, limits=None, **arguments: add(*names, **arguments)
        return group

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_known_options(self, arguments: list[str] | None) -> dict:
        """The options by name.

        Raises:
            ValueError: an option that there is not.
        """
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            raise ValueError(
                unknown_option(unknown[0].split("=")[0], [f"--{name}" for name in vars(namespace)])
            )
        return vars(namespace)


def unknown_option(name: str, known: list[str]) -> str:
    """A message, with the nearest options that there are."""
    nearest = difflib.get_close_matches(name, known, n=3)
    about = f"; nearest are {', '.join(nearest)}." if nearest else "; see --help."
    return f"unknown option {shortened(name)[1:-1]}{about}"


@contextmanager
def one_line_errors(program: str, advice: str = "") -> Iterator[None]:
    """Ends the program with one line where settings, data or the machine are wrong, instead of a traceback.

    Args:
        program: its name.
        advice: follows the message of what the machine did, such as a full disk.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"{program}: error: {one_line(error)}")
    except OSError as error:
        sys.exit(f"{program}: error: {one_line(error)}{'. ' * bool(advice)}{advice}")
    except KeyboardInterrupt:
        sys.exit(130)


def one_line(message: object) -> str:
    """A message whose lines are joined, and which ends at 2,000 characters.

    That of another process is a traceback, whose last line has the error.
    """
    text = str(message).strip()
    if "Traceback (most recent call last):" in text:
        text = text.split("\n")[-1].partition(": ")[2] or text
    text = re.sub(r"\s*\n\s*", " ", text)
    return text if len(text) <= 2000 else f"{text[:1997]}..."


def differences(saved: dict, here: dict) -> list[str]:
    """What differs, each as "name: value there, value here"; nested names are joined by spaces."""
    found = []
    for name in sorted({*saved, *here}):
        there, now = saved.get(name), here.get(name)
        if isinstance(there, dict) and isinstance(now, dict):
            found += [f"{name} {inner}" for inner in differences(there, now)]
        elif there != now:
            found.append(f"{name}: {there} there, {now} here")
    return found
