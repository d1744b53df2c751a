"""The package's docstrings as mkdocstrings takes them; griffe calls this when it has read a file.

- Options (`name: int = option(1, "help")`) become the arguments of their class, with default and help.
- Fields that have a comment behind them become its attributes.
- Arguments that share a line (`height, width: ...`) get a line each, and lists an empty one before them.
- [`Name`] is a link where the name has a place in the reference.
"""

import ast
import re

import griffe

_SHARED = re.compile(r"^(\s+)(\w+(?:, \w+)+): (.*)$")
_WRAPPED = re.compile(r"^ +(?:\w+, )*\w+,\n(?:\s+(?:\w+, )*\w+,\n)*\s+(?:\w+, )*\w+:(?=\s)", re.MULTILINE)
_REMARK = re.compile(r"^( *)# (?=\S)", re.MULTILINE)  # no heading
_REFERENCE = re.compile(r"\[`([\w.]+)`\](?![\[(])")
_COMMENT = re.compile(r"\s#\s(?!fmt:|noqa)(.+)$")


class Docstrings(griffe.Extension):
    """Changes docstrings before they are rendered."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
        """The fields of options and of tuples become a table of the class."""
        if cls.docstring is None:
            return
        options, comments = [], []
        for attr in cls.members.values():
            if not attr.is_attribute or attr.docstring is not None:
                continue
            if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) in ("option", "options"):
                call = ast.parse(str(attr.value), mode="eval").body
                given = dict(zip(("default", "help"), call.args, strict=False))
                given |= {keyword.arg: keyword.value for keyword in call.keywords}
                attr.value = ast.unparse(given["default"])
                options.append(_row(attr.name, _text_of(given["help"])))
            elif "class-attribute" in attr.labels or "instance-attribute" not in attr.labels:
                line = attr.lines_collection[attr.filepath][attr.lineno - 1]
                if comment := _COMMENT.search(line):
                    comments.append(_row(attr.name, comment[1]))
        for title, rows in (("Args", options), ("Attributes", comments)):
            if rows and f"{title}:" not in cls.docstring.value:
                cls.docstring.value += "\n\n" + "\n".join([f"{title}:", *rows])

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self._walk(pkg)

    def _walk(self, thing: griffe.Object) -> None:
        if thing.docstring is not None:
            text = "\n".join(_own_lines(thing.docstring.value))
            thing.docstring.value = _REFERENCE.sub(lambda match: _link(thing, match[1]), text)
        for member in thing.members.values():
            if not member.is_alias:
                self._walk(member)


def _row(name: str, text: str) -> str:
    return f"    {name}: {text.rstrip('.')}."


def _text_of(node: ast.expr) -> str:
    """The text of a help that may be put together of several."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
        return max(map(str, parts), key=len).rstrip(" ,:") + " …"


def _own_lines(text: str):
    """Lines of a docstring: a line for each argument, and an empty one before a list."""
    text = _REMARK.sub(r"\1", text)
    text = _WRAPPED.sub(lambda match: re.sub(r"\n\s+", " ", match[0]), text)
    waiting, before = [], ""  # arguments that have no line yet, with their indent and description
    for line in [*text.split("\n"), ""]:
        if waiting and not line.startswith(f"{waiting[0]} "):
            indent, description, first, *others = waiting
            told = (
                description if len(description) < 60 and before.endswith(description) else f"see `{first}`."
            )
            yield from (f"{indent}{other}: {told}" for other in others)
            waiting = []
        if line.startswith("- ") and before.strip() and not before.startswith(("- ", " ")):
            yield ""
        if shared := _SHARED.match(line):
            indent, names, description = shared.groups()
            waiting = [indent, description, *names.split(", ")]
            line = f"{indent}{waiting[2]}: {description}"
        yield line
        before = line


def _link(thing: griffe.Object, name: str) -> str:
    """A name as a link to its place, if it is in scope; as code otherwise."""
    first, _, rest = name.partition(".")
    try:
        path = thing.resolve(first)
    except griffe.NameResolutionError:
        return f"`{name}`"
    return f'<autoref optional identifier="{path}{"." * bool(rest)}{rest}">`{name}`</autoref>'
