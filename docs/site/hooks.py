"""The pages as they lie in the repository, made a site: mkdocs calls these.

A page links to files as a code host shows them: `../studies/digits.json`, `docs/methods.md` in the README.
Here the README becomes the home, the READMEs of `pipelines/` become pages, and other files that pages name
are copied beside them. Pictures of other hosts (badges) are left out, so that a reader's browser asks nobody.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where a page of the site lies in the repository, if not below docs/.
PAGES = {
    "index.md": "README.md",
    "pipelines/saved.md": "pipelines/README.md",
    "pipelines/comfyui.md": "pipelines/comfyui/README.md",
    "pipelines/digits.md": "pipelines/digits/README.md",
}
_LINK = re.compile(r"(\]\(|\b(?:src|href|srcset)=\")(?![a-z]+:|#|/)([^)\"#\s]+)")
_BADGE = re.compile(r"\[?!\[[^\]]*\]\(https?://[^)]*\)(?:\]\([^)]*\))?")
_FILE_AS_TEXT = re.compile(r"\[(?:[\w./]+/)?[\w-]+\.md\](?=\(([^)#]+))")
_ITEM = re.compile(r"^(?:[-*] |\d+\. )")
_FENCE = re.compile(r"^\s*```")


def place_in_repository(page: str) -> str:
    """Where a page or a file of the site lies, relative to the repository."""
    return PAGES.get(page) or f"docs/{page}"


def place_in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    for page, source in PAGES.items():
        if path == source:
            return page
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def linked(page: str, markdown: str):
    """The matches of links to files of the repository, each with the file's path."""
    folder = posixpath.dirname(place_in_repository(page))
    for match in _LINK.finditer(markdown):
        yield match, posixpath.normpath(posixpath.join(folder, match[2]))


def on_files(files, config):
    """Adds the pages that lie elsewhere, and the files that pages name."""
    from mkdocs.structure.files import File  # which tests of the rest do without

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in [*files.documentation_pages()]:
        for _, path in linked(file.src_uri, file.content_string):
            place = place_in_site(path)
            if (ROOT / path).is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The page's links as the site has them, and lists as a code host reads them."""
    here = posixpath.dirname(page.file.src_uri)
    parts, end = [], 0
    for match, path in linked(page.file.src_uri, markdown):
        if (ROOT / path).is_file():
            target = posixpath.relpath(place_in_site(path), here or ".")
            parts += [markdown[end : match.start(2)], target]
            end = match.end(2)
    markdown = "".join([*parts, markdown[end:]])

    def title(match) -> str:
        """The name of a page in the site, where a text names its file."""
        file = files.get_file_from_path(posixpath.normpath(posixpath.join(here, match[1])))
        return f"[{file.page.title}]" if file and file.page and file.page.title else match[0]

    return spaced_lists(_BADGE.sub("", _FILE_AS_TEXT.sub(title, markdown)))


def spaced_lists(markdown: str) -> str:
    """Lists that follow a paragraph without an empty line, which a code host takes for lists, get one."""
    lines, before, in_code = [], "", False
    for line in markdown.split("\n"):
        in_code ^= bool(_FENCE.match(line))
        begins = _ITEM.match(line) and before.strip() and not _ITEM.match(before) and before[:1] not in " \t|"
        lines += [""] * bool(begins and not in_code) + [line]
        before = line
    return "\n".join(lines)
