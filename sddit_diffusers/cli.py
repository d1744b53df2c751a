"""What every program asks of its command line: options that know what they may be, one line for a mistake."""

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
import textwrap
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import NamedTuple, get_args, get_origin, get_type_hints

_MOST = 2**31 - 1  # of whole numbers that have no limit of their own
MOST_WIDTH = 2**16  # of a layer, of a picture
_SPACE = "\N{NO-BREAK SPACE}"
_TRUTH = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "0"), False
)


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


def option(default, help: str, *, metavar: str = "", group: str = "", **limits):
    """A field of a program's settings.

    Args:
        help: what `--help` says of it; the default is added.
        metavar: what stands there for its value, such as FILE; by default what its type or choices tell.
        group: title of the group of `--help` that begins with it.
        limits: its [`Limits`].
    """
    told = {"help": help, "metavar": metavar, "group": group, "limits": Limits(**limits)}
    return (
        field(default_factory=default.copy, metadata=told)
        if isinstance(default, list)
        else field(default=default, metadata=told)
    )


def options(default: list, help: str, **others):
    """An [`option`] of several values, each of which keeps to the limits."""
    return option(default, help, **others)


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


class Switch(argparse.Action):
    """An option that is on or off: `--x` and `--no-x`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **arguments):
        super().__init__(option_strings, dest, nargs=0, **arguments)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class Help(argparse.HelpFormatter):
    """Each option once, with its default where it has one; text of several lines stays as it is."""

    def __init__(self, prog: str, **arguments):
        super().__init__(prog, **{"max_help_position": 32} | arguments)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        if max(map(len, text.split(" "))) > width:
            text = text.replace(_SPACE, " ")
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):
            return " / ".join(action.option_strings)
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", _shown_default(action) if action.option_strings else ""
        told = f"(default: {default})" if default else ""
        kept = told.replace(" ", _SPACE) if len(told) <= 56 else told
        return f"{text} {kept}".strip().replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """A program's command line: the [`option`]s of dataclasses, and one line for a mistake.

    Names may have hyphens in place of underscores. What is on or off is written `--x` or `--no-x`, and also
    `--x True`, `--x=false` or `--no_x`.

    Args:
        kinds: dataclasses of options, whose `_argument_group_name` is their group in `--help`.
        only: names of the options that are taken of them; all if there is none.
        prog: the program's name, where it was not called as `sddit PROGRAM`.
        doc: its first line is the description, its indented lines the examples.
        raises: whether a mistake is a ValueError, and not the program's end.
    """

    def __init__(
        self,
        kinds: type | Sequence[type],
        *,
        only: Collection[str] = (),
        prog: str | None = None,
        doc: str = "",
        raises: bool = False,
        **arguments,
    ):
        self.raises = raises
        usual = {"allow_abbrev": False, "formatter_class": Help, "description": doc.split("\n")[0]}
        if examples := [f"  {line.strip()}" for line in doc.split("\n") if line.startswith("    ")]:
            usual["epilog"] = "\n".join(["examples:", *examples])
        super().__init__(prog=_as_called(prog), **usual | arguments)
        groups = {None: self}
        for kind in [kinds] if isinstance(kinds, type) else kinds:
            title, types = getattr(kind, "_argument_group_name", None), get_type_hints(kind)
            for each in dataclasses.fields(kind):
                title = each.metadata.get("group") or title
                if not only or each.name in only:
                    groups[title] = groups.get(title) or self.add_argument_group(title)
                    _add_option(groups[title], each, types[each.name])

    def tell_defaults(self, names: Collection[str], of: str) -> None:
        """Tells in `--help` on what the defaults of some options depend.

        Args:
            of: such as "by the preset, here {}", in whose place the default stands.
        """
        for action in self._actions:
            if action.dest in names:
                action.of = of

    def format_help(self) -> str:
        """The help, whose usage names what must be given, and not each option."""
        if self.usage is None:
            self.usage = " ".join(["%(prog)s [OPTIONS]", *map(_usage, self._get_positional_actions())])
        return super().format_help().replace(_SPACE, " ")

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse, of all spellings of an option."""
        return super().parse_known_args(self._declared(sys.argv[1:] if args is None else args), namespace)

    def _declared(self, arguments: Sequence[str]) -> list[str]:
        """A command line, each option in the spelling that argparse was told."""
        known = {action.option_strings[0]: action for action in self._actions if action.option_strings}
        words, declared = deque(arguments), []
        while words and words[0] != "--":
            word = words.popleft()
            if not word.startswith("--"):
                declared.append(word)
                continue
            name, equals, value = word.partition("=")
            name = f"--{name[2:].replace('-', '_')}"
            opposite = name.replace("--no_", "--", 1)  # none, where it is the name itself
            if isinstance(known.get(name), Switch):
                if not equals and words and words[0].lower() in _TRUTH:
                    equals, value = "=", words.popleft()
                if equals and value.lower() not in _TRUTH:
                    self.error(f"argument {name}: {shortened(value)} is neither True nor False")
                declared.append(known[name].option_strings[not _TRUTH.get(value.lower(), True)])
            elif name in known:
                declared.append(name + equals + value)
            elif isinstance(known.get(opposite), Switch):
                declared.append(known[opposite].option_strings[1] + equals + value)
            else:
                declared.append(word)
        return declared + [*words]

    def error(self, message: str) -> None:
        if self.raises:
            raise ValueError(message)
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_known_options(self, arguments: list[str] | None) -> dict:
        """The options by name.

        Raises:
            ValueError: an option that there is not.
        """
        namespace, unknown = self.parse_known_args(arguments)
        if unknown and not unknown[0].startswith("-"):
            raise ValueError(f"{shortened(unknown[0])} is of no option; see --help.")
        if unknown:
            known = [name for action in self._actions for name in action.option_strings if name[:2] == "--"]
            raise ValueError(unknown_option(unknown[0].split("=")[0], known))
        return vars(namespace)


def _add_option(group, setting: dataclasses.Field, kind: type) -> None:
    """Adds the option of a dataclass's field, of this type, to a parser or one of its groups."""
    told, missing = setting.metadata, setting.default is dataclasses.MISSING
    arguments = {
        "help": told.get("help", ""),
        "default": setting.default_factory() if missing else setting.default,
    }
    if kind is bool:
        group.add_argument(f"--{setting.name}", f"--no-{setting.name}", action=Switch, **arguments)
        return
    inner = [each for each in get_args(kind) if each is not type(None)]  # of a list, or of `int | None`
    value = inner[0] if inner else kind
    choices = f"{{{','.join(filter(None, told.get('limits', Limits()).choices))}}}"
    usual = {int: "N", float: "X"}.get(value, "NAME")
    if get_origin(kind) is list:
        arguments["nargs"] = "+"
    elif 2 < len(choices) <= 36:
        usual = choices
    group.add_argument(f"--{setting.name}", type=value, metavar=told.get("metavar") or usual, **arguments)


def _usage(positional: argparse.Action) -> str:
    """How an argument without a name stands in the usage."""
    name = positional.metavar or "|".join(positional.choices or [positional.dest.upper()])
    return {"?": f"[{name}]", "+": f"{name} [{name} ...]"}.get(positional.nargs, name)


def _shown_default(action: argparse.Action) -> str:
    """A default for people; empty where there is none."""
    value = action.default
    if isinstance(action, Switch):
        shown = "on" if value else "off"
    elif value is None or value is argparse.SUPPRESS or value == "{}":
        shown = ""
    else:
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return action.of.format(shown or "none") if hasattr(action, "of") else shown


def _as_called(program: str | None) -> str | None:
    """The name for messages: `sddit PROGRAM`, where the program was called by it."""
    return sys.argv[0] if sys.argv[0].startswith("sddit ") else program


def as_arguments(settings: dict) -> list[str]:
    """Settings of a study as a program's command line."""
    arguments = []
    for name, value in settings.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments


def unknown_option(name: str, known: list[str]) -> str:
    """A message, with the nearest options that there are."""
    nearest = difflib.get_close_matches(name, known, n=3)
    about = f"; nearest are {', '.join(nearest)}." if nearest else "; see --help."
    return f"unknown option {shortened(name)[1:-1]}{about}"


@contextmanager
def one_line_errors(program: str, advice: str = "") -> Iterator[None]:
    """Ends the program with one line where settings, data or the machine are wrong, instead of a traceback.

    Args:
        program: its name, where it was not called as `sddit PROGRAM`.
        advice: follows the message of what the machine did, such as a full disk.
    """
    program = _as_called(program)
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
