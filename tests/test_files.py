"""Files that are complete or absent, folders with one writer, JSON of any content."""

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Started

from sddit_diffusers.files import (
    LOCK,
    folder_written_aside,
    locked,
    parse_json,
    read_json,
    save_tensors,
    written_aside,
)


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), written_aside(tmp_path / "a", "w") as file:
        file.write("ne")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("write", ["file", "tensors"])
def test_links_are_replaced_not_followed(tmp_path, write):
    (tmp_path / "theirs").write_text("theirs")
    for name in ("ours", f".ours.{os.getpid()}.tmp", ".ours.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    if write == "file":
        with written_aside(tmp_path / "ours", "w") as file:
            file.write("ours")
    else:
        save_tensors(tmp_path / "ours", {"a": torch.zeros(2)})
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "ours").is_symlink() and (tmp_path / "ours").stat().st_size


def test_a_folder_takes_the_place_of_another_when_it_is_whole(tmp_path):
    folder, theirs = tmp_path / "folder", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "weights").write_text("theirs")
    folder.mkdir()
    (folder / "transformer").symlink_to(theirs)
    (folder / "model_index.json").symlink_to(theirs / "weights")
    (folder / "metrics").write_text("kept")
    with pytest.raises(RuntimeError), folder_written_aside(folder) as aside:
        (aside / "metrics").write_text("new")
        raise RuntimeError
    assert (folder / "metrics").read_text() == "kept"
    with folder_written_aside(folder) as aside:
        (aside / "transformer").mkdir()
        (aside / "transformer" / "weights").write_text("ours")
        (aside / "model_index.json").write_text("{}")
    assert (theirs / "weights").read_text() == "theirs"
    assert (folder / "transformer" / "weights").read_text() == "ours"
    assert not (folder / "model_index.json").is_symlink()
    assert sorted(os.listdir(folder)) == ["metrics", "model_index.json", "transformer"]


@pytest.mark.process
def test_one_run_writes_in_a_folder(tmp_path):
    folder, script, held = (tmp_path / name for name in ("run", "holder.py", "held"))
    folder.mkdir()
    script.write_text(
        "import sys, time; from pathlib import Path; from sddit_diffusers.files import locked\n"
        "with locked(Path(sys.argv[1])): Path(sys.argv[2]).touch(); time.sleep(60)"
    )

    def in_use():
        if held.exists():
            with pytest.raises(ValueError, match=f"is in use by process {other.pids[0]} "):
                with locked(folder, patience=0):
                    pass
        return held.exists()

    other = Started(1, script, folder, held)
    other.kill_when(in_use)
    (folder / f".samples.npz.{other.pids[0]}.tmp").write_text("left over")
    with locked(folder, patience=5):  # it went with the process
        assert os.listdir(folder) == [LOCK]  # and so has what it left
        with pytest.raises(ValueError, match=f"process {os.getpid()} "):
            with locked(folder, patience=0):
                pass
    assert os.listdir(folder) == []


STRUCTURE = {"count": range(0, 10), "shards": [{"file": str, "rows?": int}], "names": (None, [str])}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "it is []; it must be an object"),
        ({}, "it has no 'count'"),
        ({"count": 10}, "count is 10; it must be a whole number in 0..9"),
        ({"count": True}, "count is True; it must be a whole number in 0..9"),
        ({"count": 1, "shards": {}}, "shards is {}; it must be a list"),
        ({"count": 1, "shards": [{"file": "a"}, {"file": 1}]}, r"shards[1].file is 1; it must be text"),
        ({"count": 1, "shards": [{"file": "a", "rows": 1.0}]}, "shards[0].rows is 1.0; it must be a whole"),
        ({"count": 1, "shards": [], "names": ["a", None]}, "names[1] is None; it must be text"),
    ],
)
def test_json_of_another_structure_is_refused_where_it_differs(tmp_path, value, problem):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "a.json", STRUCTURE, "manifest")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'} is no manifest: {problem}")


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "[1, Infinity]", "[" * 100_000, b"\xff\xfe\x00"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError, match="^here is no record: it is no JSON"):
        parse_json(text, {}, "record", "here")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_json_is_either_of_the_structure_or_refused(value):
    try:
        found = parse_json(json.dumps(value), {str: [float]}, "record", "here")
    except ValueError as error:
        assert "here is no record" in str(error)
    else:
        assert found == value
        assert all(math.isfinite(number) for numbers in value.values() for number in numbers)
