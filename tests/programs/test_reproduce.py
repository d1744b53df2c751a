"""Studies, run as users run them, with networks of a few thousand weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bad_input import refusal
from PIL import Image
from processes import Started, launch
from small_study import STUDY

from sddit_diffusers import reproduce
from sddit_diffusers.evaluation import report
from sddit_diffusers.evaluation.studies import read_study
from sddit_diffusers.evaluation.tables import Results, markdown
from sddit_diffusers.files import locked
from sddit_diffusers.reproduce import ReproduceConfig, Reproduction
from sddit_diffusers.training import measuring
from sddit_diffusers.training.options import TrainingConfig, parse

STUDIES = Path(reproduce.__file__).parents[1] / "studies"


@pytest.fixture
def write(tmp_path):
    def write_study(**changes):
        path = tmp_path / "small.json"
        path.write_text(json.dumps(STUDY | changes))
        return path

    return write_study


def run(path, folder, *options):
    reproduce.main([str(path), "--output_dir", str(folder), *options])
    return json.loads((folder / "results.json").read_text())


def table_of(results, title):
    (table,) = (table for table in results["tables"] if table["title"].startswith(title))
    return {row[0]: row[1:] for row in table["rows"]}


@pytest.mark.thorough
@pytest.mark.figures
def test_a_study_in_parts_is_the_study(write, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SPEED_ROUNDS", 2)
    path = write()
    empty = run(path, tmp_path / "a", "--report_only")
    assert table_of(empty, "Table 1") == {"DiT": [68.40], "SD-DiT": [48.39]}
    results = run(path, tmp_path / "a", "--seeds", "5", "--runs", "SD-DiT")
    first = (tmp_path / "a/sd-dit/seed-5/metrics.jsonl").read_bytes()
    assert table_of(results, "Table 1")["DiT"] == [68.40, [], []]
    results = run(path, tmp_path / "a")
    assert (tmp_path / "a/sd-dit/seed-5/metrics.jsonl").read_bytes() == first
    assert not list((tmp_path / "a").rglob("checkpoint-*"))

    # What the runs' own files say.
    scores = {}
    for name in ("dit", "sd-dit", "mask-0"):
        for seed in (0, 5):
            rows = (tmp_path / f"a/{name}/seed-{seed}/metrics.jsonl").read_text().splitlines()
            for row in map(json.loads, rows):
                if "fid_pixels" in row:
                    scores.setdefault((name, row["step"]), []).append(row["fid_pixels"])
    assert table_of(results, "Table 1")["SD-DiT"] == [48.39, scores["sd-dit", 2], scores["sd-dit", 4]]
    assert table_of(results, "Figure 5") == {
        "mask 0": [58.92, scores["mask-0", 4]],
        "SD-DiT": [None, scores["sd-dit", 4]],
    }
    paper, speed, quality = table_of(results, "Figure 3")["DiT"]
    assert paper == [5.03, 68.40] and speed[0] > 0 and quality == scores["dit", 4]
    assert table_of(results, "Diagnostics")["DiT"] == [None, []]  # it has no teacher
    assert len(table_of(results, "Diagnostics")["SD-DiT"][1]) == 2
    probed = table_of(results, "Probe")
    assert probed["DiT"][1] == [] and len(probed["SD-DiT"][1]) == 2  # which has a [CLS] token
    assert all(0 <= value <= 1 for row in probed.values() for values in row[1:] for value in values)
    sampled = table_of(results, "Sampler")
    assert len(sampled["N = 2"][1]) == 2 and sampled["N = 2"] != sampled["rho 3"]
    for name in ("table-1", "figure-3", "figure-5", "diagnostics", "probe", "sampler"):
        assert Image.open(tmp_path / f"a/{name}.png").getextrema() != ((255, 255),) * 4
        assert (tmp_path / f"a/{name}.svg").read_text().startswith("<?xml")

    # Of a study that was changed, what was changed is measured again, and nothing else.
    files = [path for path in (tmp_path / "a").rglob("*.json") if path.stem != "results"]
    times = {path: path.stat().st_mtime_ns for path in files}
    *others, probe, sampler = STUDY["tables"]
    again = run(write(tables=[*others, probe | {"sigmas": [0.1, 1.0]}, sampler]), tmp_path / "a")
    changed = {path.name for path in files if path.stat().st_mtime_ns != times[path]}
    assert changed == {"probe.json"} and len(table_of(again, "Probe")["DiT"]) == 5

    mean, spread = torch.tensor(scores["dit", 4]).mean(), torch.tensor(scores["dit", 4]).std()
    assert f"| {mean:.4g} ± {spread:.2g} |" in (tmp_path / "a/results.md").read_text()


@pytest.mark.process
def test_killed_and_started_again_it_gives_the_same(write, tmp_path):
    """SIGKILL in the middle of the second run; what comes out is that of a study that nobody disturbed."""
    only_training = [table for table in STUDY["tables"] if table["kind"] in ("steps", "metrics")]
    runs = {name: STUDY["runs"][name] for name in ("DiT", "SD-DiT")}
    settings = STUDY["settings"] | {"max_train_steps": 6}
    path = write(tables=only_training, runs=runs, settings=settings, seeds=[0])
    study = Started(1, "-m", "sddit_diffusers.reproduce", path, "--output_dir", tmp_path / "a")
    study.kill_when(lambda: list((tmp_path / "a/sd-dit").glob("*/checkpoint-*")))
    run(path, tmp_path / "a")
    run(path, tmp_path / "b")
    for name in ("results.md", "results.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.thorough
@pytest.mark.process
def test_many_processes_run_a_study_together(write, tmp_path):
    """Each trains a part of each batch; speeds, probes and samplings come from the main one alone."""
    settings = STUDY["settings"] | {"mixed_precision": "bf16"}
    path = write(settings=settings | {"train_batch_size": 8}, seeds=[0])
    result = launch(2, "-m", "sddit_diffusers.reproduce", path, "--output_dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    alone = run(write(settings=settings, seeds=[0]), tmp_path / "one")
    together = json.loads((tmp_path / "two/results.json").read_text())
    for title in ("Table 1", "Figure 5", "Sampler"):
        for name, row in table_of(alone, title).items():
            for mine, theirs in zip(row[1:], table_of(together, title)[name][1:], strict=True):
                assert theirs == pytest.approx(mine, rel=0.02)
    assert table_of(together, "Figure 3")["DiT"][1][0] > 0
    assert len(table_of(together, "Probe")["SD-DiT"][1]) == 1


@pytest.mark.thorough
def test_a_run_that_was_killed_at_its_end_is_completed(write, tmp_path):
    """Whatever of its last files is missing, and while its checkpoints go."""
    path = write(tables=[STUDY["tables"][0]], runs={"DiT": STUDY["runs"]["DiT"], "SD-DiT": {}}, seeds=[0])
    folder, command = tmp_path / "a/dit/seed-0", ("--runs", "DiT")
    kept = tmp_path / "kept"

    def killed(checkpoint):
        shutil.copytree(checkpoint, kept, dirs_exist_ok=True)
        (checkpoint / "state.pt").unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(reproduce, "remove", killed)
        run(path, tmp_path / "a", *command)
    complete = {name: (folder / name).read_bytes() for name in ("README.md", "curves.png", "metrics.jsonl")}
    assert run(path, tmp_path / "a", *command)["tables"][0]["rows"][0][-1]
    assert not list(folder.glob("checkpoint-*"))

    for missing in ("README.md", "curves.png", "model_index.json"):
        shutil.copytree(kept, folder / "checkpoint-4")
        for name in ("README.md", missing):
            (folder / name).unlink(missing_ok=True)
        run(path, tmp_path / "a", *command)
        assert {name: (folder / name).read_bytes() for name in complete} == complete
        assert (folder / "model_index.json").is_file() and not list(folder.glob("checkpoint-*"))


def test_what_is_known_is_not_run_again(write, tmp_path, capsys):
    """The results of another machine, whose trainings are not here."""
    tables = [STUDY["tables"][0], STUDY["tables"][3]]
    path = write(tables=tables, runs={"DiT": STUDY["runs"]["DiT"], "SD-DiT": {}}, seeds=[0])
    there = run(path, tmp_path / "there", "--runs", "DiT")
    known = ["--known", str(tmp_path / "there/results.json")]
    page = tmp_path / "docs/page.md"
    here = run(path, tmp_path / "here", *known, "--page", str(page))
    assert not (tmp_path / "here/dit").exists() and (tmp_path / "here/sd-dit/seed-0").is_dir()
    assert table_of(here, "Table 1")["DiT"] == table_of(there, "Table 1")["DiT"]
    assert table_of(here, "Table 1")["SD-DiT"][-1] and here["found"]["runs"].keys() == {"DiT", "SD-DiT"}
    assert "](../here/table-1.png)" in page.read_text() and not (tmp_path / "here/results.md").exists()
    drawn = run(path, tmp_path / "drawn", "--report_only", "--known", str(tmp_path / "here/results.json"))
    assert drawn == here
    assert "do not compare" not in page.read_text()
    capsys.readouterr()
    for row in there["found"]["runs"]["DiT"]["seeds"]["0"]["metrics"]:
        row["judges"]["pixels"] = "another"
    (tmp_path / "there/results.json").write_text(json.dumps(there))
    run(path, tmp_path / "here", *known, "--page", str(page))
    doubt = "Scores by pixels do not compare, as its judges differ: another scored 1, such as DiT of seed 0; "
    assert doubt in capsys.readouterr().err and "**Scores by pixels do not compare, as" in page.read_text()
    kept = (tmp_path / "drawn/results.json").read_bytes()
    with refusal(
        capsys, "drawn/results.json has 2 trainings that are not here, such as DiT of seed 0, and they"
    ):
        run(path, tmp_path / "drawn", "--report_only")
    assert (tmp_path / "drawn/results.json").read_bytes() == kept
    other = write(
        tables=tables, runs={"DiT": STUDY["runs"]["DiT"] | {"learning_rate": 0.5}, "SD-DiT": {}}, seeds=[0]
    )
    with refusal(capsys, "learning_rate of DiT was 0.006, and is 0.5 in the study."):
        run(other, tmp_path / "other", *known)
    with refusal(capsys, "max_train_steps of DiT was 4, and is 2 in the study."):
        run(path, tmp_path / "other", *known, "--settings", '{"max_train_steps": 2}')


def test_one_process_measures_speeds_at_a_time(write, tmp_path, monkeypatch):
    """And one that has waited does not measure again."""
    reproduction = Reproduction(ReproduceConfig(output_dir=str(tmp_path / "a")), write(tables=[]))
    measured = []

    def measure(configs, folder, accelerator, runs):
        with pytest.raises(ValueError, match="is in use"), locked(tmp_path / "a", patience=0):
            pass
        measured.append(runs)
        return {"DiT": 1.0}

    monkeypatch.setattr(reproduction, "timed", lambda: ["DiT"])
    monkeypatch.setattr(reproduce, "steps_a_second", measure)
    for _ in range(2):
        reproduction.measure()
    assert measured == [["DiT"]] and [path.name for path in (tmp_path / "a").iterdir()] == ["speeds.json"]


def test_a_measurement_that_fails_keeps_the_others(write, tmp_path, monkeypatch, capsys):
    """And the tables, whatever cannot be sampled."""
    sampling = STUDY["tables"][5] | {"samplings": {"N = 2": {"sigmas": [1.0, 2.0]}, "rho 3": {}}}
    steps = {"title": "Table 1", "kind": "steps", "paper": {"DiT": None}}
    path = write(tables=[steps, sampling], runs={"DiT": STUDY["runs"]["DiT"]}, seeds=[0])
    with refusal(capsys, "Not all could be measured: dit/seed-0/sampling-n-2.json: "):
        run(path, tmp_path / "a")
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert table_of(results, "Sampler")["N = 2"] == [None, []]
    assert len(table_of(results, "Sampler")["rho 3"][1]) == len(table_of(results, "Table 1")["DiT"][-1]) == 1


def test_each_run_is_timed_with_its_own_accumulation(write, tmp_path, monkeypatch):
    other = STUDY["runs"]["SD-DiT"] | {"gradient_accumulation_steps": 4, "allow_tf32": False}
    reproduction = Reproduction(ReproduceConfig(), write(runs=STUDY["runs"] | {"SD-DiT": other}))
    seen = []

    def train_step(trainer, step, data):
        flag = torch.backends.cuda.matmul.allow_tf32
        seen.append((trainer.accelerator.gradient_accumulation_steps, flag))

    monkeypatch.setattr(measuring, "SPEED_ROUNDS", 1)
    monkeypatch.setattr(measuring.Trainer, "train_step", train_step)
    accelerator = reproduction.accelerator
    measuring.steps_a_second(reproduction.first, tmp_path / "speed", accelerator, ["DiT", "SD-DiT"])
    assert seen == [(1, True), (4, False)] * 3


@pytest.mark.parametrize("name", ["leaderboard", "discrimination", "showcase"])
def test_a_page_of_a_study_is_what_was_found(name, tmp_path, monkeypatch):
    """docs/NAME.md has no number that is not in its results."""
    monkeypatch.setattr(report, "draw", lambda *arguments: None)
    docs, page = STUDIES.parent / "docs", tmp_path / f"{name}.md"
    known = ["--known", str(docs / name / "results.json"), "--settings", '{"dataset_name": "somewhere"}']
    run(STUDIES / f"{name}.json", tmp_path / name, "--report_only", "--page", str(page), *known)
    assert page.read_text() == (docs / f"{name}.md").read_text()
    assert (tmp_path / name / "results.json").read_text() == (docs / name / "results.json").read_text()


def test_precisions_cannot_differ(write, tmp_path, capsys):
    runs = STUDY["runs"] | {"DiT": STUDY["runs"]["DiT"] | {"mixed_precision": "bf16"}}
    with refusal(capsys, "it must be the same in all runs"):
        run(write(runs=runs), tmp_path / "a")


def test_other_settings_than_those_begun_with_are_refused(write, tmp_path, capsys):
    run(write(), tmp_path / "a", "--runs", "DiT", "--seeds", "0")
    for others in ([], ["--runs", "SD-DiT"]):  # before others are trained
        with refusal(capsys, "learning_rate: 0.006 there, 0.5 here. Choose another --output_dir"):
            run(write(), tmp_path / "a", "--settings", '{"learning_rate": 0.5}', *others)
    assert not (tmp_path / "a/sd-dit").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds are []"),
        ({"tables": [{"title": "T", "kind": "pie", "paper": {}}]}, "T: its kind is 'pie'; there are steps,"),
        ({"tables": [{"title": "T", "kind": "steps", "paper": {"X": 1}}]}, "there is no run 'X'; there are"),
        ({"tables": [{"title": "T", "kind": "probe", "paper": {}}]}, "needs sigmas"),
        ({"tables": [STUDY["tables"][2] | {"setting": "seed"}]}, "Figure 5: mask 0 has no setting 'seed'"),
        ({"tables": [STUDY["tables"][4], STUDY["tables"][4]]}, "several tables of kind probe"),
        ({"runs": {"A b": {}, "a-b": {}}, "tables": []}, "would write a-b, which is of the run 'A b'"),
        ({"colour": "red"}, "there is nothing called 'colour'"),
        ({"settings": {"presett": "digits"}}, "DiT: unknown option --presett"),
        ({"runs": STUDY["runs"] | {"new": {"mask_ratio": 2}}}, "new: mask_ratio is 2"),
        ({"runs": STUDY["runs"] | {"new": {"learning_rate": "x"}}}, "new: argument --learning_rate"),
        ({"metric": "fid_resnet"}, "DiT has no 'fid_resnet': its evaluation_extractor, pixels, gives fid"),
        ({"tables": [STUDY["tables"][3] | {"columns": ["kl", "fid"]}]}, "DiT has no 'fid': its evaluation_e"),
        ({"settings": {"preset": "cifar10"}}, "is not scored"),
        ({"settings": STUDY["settings"] | {"push_to_hub": True}}, "DiT: push_to_hub is on"),
        (
            {"runs": STUDY["runs"] | {"mask 0": STUDY["runs"]["SD-DiT"]}},
            "Figure 5: mask 0 and SD-DiT both have mask_ratio 0.5",
        ),
    ],
)  # fmt: skip
def test_wrong_studies_are_refused(changes, message, write, tmp_path, capsys):
    with refusal(capsys, message):
        run(write(**changes), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_is_no_study_is_refused(tmp_path, capsys):
    for content in ("{", "[1]", "{}", '{"tables": [[]]}'):
        (tmp_path / "it.json").write_text(content)
        with refusal(capsys, "it.json is no study: "):
            reproduce.main([str(tmp_path / "it.json")])
    with refusal(capsys, "other.json cannot be read: No such file"):
        reproduce.main([str(tmp_path / "other.json")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "SiT"], "There is no run 'SiT'; there are DiT, SD-DiT, mask 0."),
        (["--seeds", "7"], "There is no seed 7; there are 0, 5."),
        (["--settings", "{"], "which is no JSON"),
        (["--page", "."], "page is '.', which is a folder; it must be a file."),
    ],
)
def test_wrong_choices_are_refused(options, message, write, tmp_path, capsys):
    with refusal(capsys, message):
        run(write(), tmp_path / "a", *options)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_the_project_s_studies_can_be_run(path, tmp_path):
    reproduction = Reproduction(
        ReproduceConfig(output_dir=str(tmp_path), settings='{"dataset_name": "somewhere"}'), path
    )
    study = reproduction.study
    assert len(study.seeds) >= 3 or path.stem in ("imagenet", "showcase")  # which are of hours and more
    headings = len(study.tables) + sum(note.startswith("## ") for note in study.summary + study.notes)
    assert markdown(study, Results()).count("\n## ") == headings


@pytest.mark.parametrize("name", ["digits", "digits-search", "digits-process", "digits-steps"])
def test_studies_of_the_digits_keep_the_recipe_that_they_were_run_with(name, tmp_path):
    """Whatever the preset's becomes."""
    reproduction = Reproduction(ReproduceConfig(output_dir=str(tmp_path)), STUDIES / f"{name}.json")
    configs = [config for config in reproduction.first.values() if isinstance(config, TrainingConfig)]
    assert configs
    for config in configs:
        edm = config.process == "edm"
        assert (config.p_mean, config.p_std) == ((-1.2, 1.2) if edm else (0.0, 1.0))
        assert config.sigma_data == 0.5 or not edm
        assert (config.train_batch_size, config.learning_rate) == (128, 3e-3)
        assert (config.lr_scheduler, config.lr_warmup_steps, config.ema_decay) == ("constant", 100, 0.9999)
        steps = {"digits-process": 1000, "digits-steps": 1500}
        assert config.max_train_steps == steps.get(name, 450)


def test_studies_have_the_paper_s_figures():
    study = read_study(STUDIES / "imagenet.json")
    table_1, table_3 = (next(t for t in study.tables if t.title.startswith(f"Table {i}")) for i in (1, 3))
    assert table_1.paper == {"DiT": 68.40, "MDT": 53.46, "MaskDiT": None, "SD-DiT": 48.39}
    assert list(table_3.paper.values()) == [53.72, 62.84, 58.92]
    steps, gains = ([t for t in study.tables if t.kind == kind] for kind in ("steps", "gains"))
    figures = {run: figure for table in [study.tables[0], *steps] for run, figure in table.paper.items()}
    for name, (one, other) in gains[0].pairs.items():
        both = figures[one] and figures[other]
        assert gains[0].paper[name] == (round(figures[one] / figures[other], 4) if both else None), name
    config = parse([f"--{name}={value}" for name, value in study.settings.items()] + ["--dataset_name=x"])
    assert (config.max_train_steps, config.train_batch_size, config.learning_rate) == (400_000, 256, 1e-4)
    assert (config.evaluation_samples, config.evaluation_extractor) == (50_000, ["inception"])
