"""Studies of distillations: trained after their parents, scored over evaluations of the network."""

import json

import pytest
from bad_input import refusal
from PIL import Image
from processes import Started
from small_study import CHILDREN, EVALUATIONS, LINES, SSD

from sddit_diffusers import reproduce
from sddit_diffusers.evaluation import figures
from sddit_diffusers.evaluation.studies import read_study
from sddit_diffusers.evaluation.tables import Results, as_json
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.parents import load_parent


@pytest.fixture
def write(tmp_path):
    def write_study(**changes):
        path = tmp_path / "small.json"
        path.write_text(json.dumps(CHILDREN | changes))
        return path

    return write_study


def run(path, folder, *options):
    reproduce.main([str(path), "--output_dir", str(folder), *options])
    tables = json.loads((folder / "results.json").read_text())["tables"]
    return {table["title"]: {row[0]: row[1:] for row in table["rows"]} for table in tables}


@pytest.mark.long
@pytest.mark.figures
def test_children_are_trained_after_their_parents_and_scored_beside_them(write, tmp_path):
    path, folder = write(), tmp_path / "a"
    with pytest.raises(
        SystemExit, match="SSD 4 is a distillation of SD-DiT, which is not trained with seed 5"
    ):
        run(path, folder, "--runs", "SSD 4")
    results = run(path, folder)
    made = {name: folder / name / "seed-5" for name in ("sd-dit", "ssd-4", "ssd-2")}
    configs = {name: json.loads((made[name] / "training_config.json").read_text()) for name in made}
    for name, parent in (("ssd-4", "sd-dit"), ("ssd-2", "ssd-4")):
        assert configs[name]["parent_sha256"] == load_parent(str(made[parent])).sha256
    for name in ("dataset_name", "evaluation_extractor", "evaluation_samples", "num_validation_images"):
        assert configs["ssd-2"][name] == configs["sd-dit"][name]

    scores = {name: {row["step"]: row.get("fid_pixels") for row in read_metrics(made[name] / "metrics.jsonl")}
              for name in made}  # fmt: skip
    assert results["Steps"] == {
        name: [None, *([scores[slug][step]] for step in (0, 2, 4))]
        for name, slug in (("SSD 4", "ssd-4"), ("SSD 2", "ssd-2"))
    }
    assert results["Lambda"] == {"SSD 4": [None, [scores["ssd-4"][4]]]}

    table = results["Evaluations"]  # columns: 2, 3, 4 and 5 evaluations
    begun = scores["ssd-4"][0]  # the parent, before the first step
    for name in ("Euler", "theirs"):  # by rounding a pixel may take the next of its 17 values
        assert table[name][3] == pytest.approx([begun], rel=1e-3)
    assert table["SSD"] == [[32, 1.99], [scores["ssd-2"][4]], None, [scores["ssd-4"][4]], None]
    assert [bool(cell) for cell in table["Heun"]] == [False, False, True, False, True]
    assert [bool(cell) for cell in table["SSD, images/s"]] == [False, True, False, True, False]
    assert table["Euler, images/s"][1][0] > table["Heun, images/s"][4][0] > 0  # 2 and 5 evaluations
    assert Image.open(folder / "evaluations.png").getextrema() != ((255, 255),) * 4

    # What was measured stays; another sampling is measured beside all others.
    files = [folder / "sampling-speeds.json", *made["sd-dit"].glob("sampling-*.json")]
    times = {path: path.stat().st_mtime_ns for path in files}
    assert run(path, folder) == results
    assert {path: path.stat().st_mtime_ns for path in files} == times
    lines = LINES | {"Heun": LINES["Heun"] | {"num_inference_steps": [2]}}
    run(write(tables=[EVALUATIONS | {"lines": lines}]), folder)
    assert [path.name for path in files if path.stat().st_mtime_ns != times[path]] == ["sampling-speeds.json"]


@pytest.mark.thorough
@pytest.mark.process
def test_killed_in_a_child_and_started_again_it_gives_the_same(write, tmp_path):
    path = write(tables=CHILDREN["tables"][:1])
    study = Started(1, "-m", "sddit_diffusers.reproduce", path, "--output_dir", tmp_path / "a")
    study.kill_when(lambda: list((tmp_path / "a/ssd-4").glob("*/checkpoint-*")))
    assert run(path, tmp_path / "a") == run(path, tmp_path / "b")
    for name in ("ssd-4", "ssd-2"):
        weights = "seed-5/transformer/diffusion_pytorch_model.safetensors"
        assert len({(tmp_path / place / name / weights).read_bytes() for place in "ab"}) == 1


def with_runs(**runs):
    return {"runs": {"SD-DiT": {}, **runs}, "tables": []}


def with_line(line):
    return {"tables": [EVALUATIONS | {"lines": {"A": line}, "paper": {"A": None}}]}


EULER = LINES["Euler"]
WRONG = {
    "no parent": (with_runs(A={"of": "B"}), "'A' is of 'B'; there is no such run, there are SD-DiT, A."),
    "itself": (with_runs(A={"of": "A"}), "'A' comes from itself: A of A."),
    "circle": (with_runs(A={"of": "B"}, B={"of": "C"}, C={"of": "B"}), "'A' comes from itself"),
    "no name": (with_runs(A={"of": 1}), "runs.A.of is 1; it must be text"),
    "unknown setting": (with_runs(A=SSD | {"lambda": 1}), "A: unknown option --lambda"),
    "of another program": (with_runs(A=SSD | {"mask_ratio": 0.5}), "A: unknown option --mask_ratio"),
    "value": (with_runs(A=SSD | {"fusion_weight": 2}), "A: fusion_weight is 2.0; it must be in 0..1"),
    "no lambda": (with_runs(A={"of": "SD-DiT"}), "A: fusion_weight is []; it must be one"),
    "chain": (with_runs(A=SSD | {"num_inference_steps": [4, 2]}), "num_inference_steps is [4, 2]"),
    "unscored": (with_runs(A=SSD | {"evaluation_steps": 0}), "A is not scored"),
    "precision": (with_runs(A=SSD | {"mixed_precision": "bf16"}), "must be the same in all runs"),
    "distillation": ({"distillation": []}, "distillation is []; it must be an object"),
    "no lines": ({"tables": [EVALUATIONS | {"lines": {}}]}, "evaluations needs lines"),
    "line": (with_line(3), "lines.A is 3; it must be an object"),
    "line of no run": (with_line(["B"]), "there is no run 'B'"),
    "line of a parent": (with_line(["SD-DiT"]), "'SD-DiT' is no distillation"),
    "line without steps": (with_line({"run": "SD-DiT"}), "lines.A has no 'num_inference_steps'"),
    "line of no step": (with_line(EULER | {"num_inference_steps": [0]}), "num_inference_steps[0] is 0"),
    "line's argument": (with_line(EULER | {"steps": 3}), "there is no argument 'steps'"),
    "line's sigmas": (with_line(EULER | {"sigmas": [1.0]}), "there is no argument 'sigmas'"),
    "line's paper": ({"tables": [EVALUATIONS | {"paper": {}}]}, "paper must have the names of the lines"),
    "two tables": ({"tables": [EVALUATIONS, EVALUATIONS]}, "several tables of kind evaluations"),
    "class": (with_line(EULER | {"scheduler_class": "X"}), "A, N = 2: There is no EDM scheduler 'X'"),
    "its setting": (
        with_line({"run": "SD-DiT", "num_inference_steps": [2], "scheduler_class": "EDMEulerScheduler",
                   "scheduler": {"roh": 3}}),
        "A, N = 2: The scheduler has no setting 'roh'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_studies_of_children_are_refused(case, write, tmp_path, capsys):
    changes, message = WRONG[case]
    path = write(**changes)
    with refusal(capsys, message, untouched=tmp_path):
        run(path, tmp_path / "a")


def test_lines_are_drawn_over_evaluations_and_over_images_a_second(write, tmp_path, monkeypatch):
    study, results = read_study(write(tables=[EVALUATIONS])), Results()
    for name, count, score in (("Euler, N = 2", 2, 8.0), ("Euler, N = 4", 4, 2.0), ("Heun, N = 3", 5, 1.0)):
        results.add("SD-DiT", 0, ("evaluations", name), count)
        results.add("SD-DiT", 0, ("images", name), 100 / count)
        results.add("SD-DiT", 0, ("sampling", name), score)
        results.add("SD-DiT", 1, ("sampling", name), 3 * score)
    for run, count, score in (("SSD 4", 4, 1.5), ("SSD 2", 2, 3.0)):  # not measured side by side yet
        results.add(run, 0, ("evaluations", ""), count)
        results.add(run, 0, ("last",), score)
    (table,) = as_json(study, results)["tables"]
    assert table["columns"] == ["evaluations", "paper", "2", "4", "5"]
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert rows["Euler"] == [None, [8.0, 24.0], [2.0, 6.0], None]
    assert rows["SSD"] == [[32, 1.99], [3.0], [1.5], None]
    assert rows["Euler, images/s"] == [None, [50.0], [25.0], None]

    drawn = {}

    def look(figure):
        for panel in figure.axes:
            lines = {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
            drawn[panel.get_xlabel()] = lines

    monkeypatch.setattr(figures.plt, "close", look)
    figures.draw(study.tables[0], study, results, tmp_path)
    assert drawn["evaluations of the network"] == {
        "Euler": [[2, 16], [4, 4]], "Heun": [[5, 2]], "SSD": [[2, 3], [4, 1.5]],
    }  # fmt: skip
    assert drawn["images a second"] == {"Euler": [[25, 4], [50, 16]], "Heun": [[20, 2]]}
