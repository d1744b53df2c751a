"""What is left of a study: its page, its figures, and all that was found."""

import json
import os
import sys
from pathlib import Path

from ..files import written_aside
from .figures import draw
from .findings import Findings
from .studies import Study
from .tables import Results, as_json, markdown


def write(study: Study, results: Results, findings: Findings, folder: Path, page: str) -> None:
    """Writes tables and figures into a folder, the tables to another page if one is named."""
    path = Path(page or folder / "results.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    doubts = findings.doubts()
    for doubt in doubts:
        print(doubt.replace("**", ""), file=sys.stderr)
    figures = Path(os.path.relpath(folder, path.parent)).as_posix()
    with written_aside(path, "w") as file:
        file.write(markdown(study, results, figures, doubts))
    content = as_json(study, results) | {"found": findings.as_json()}
    with written_aside(folder / "results.json", "w") as file:
        file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
    for table in study.tables:
        draw(table, study, results, folder)
    print(f"Done: tables and figures ({len(study.tables)}) are in {path}")
