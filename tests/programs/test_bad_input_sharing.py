"""What studies, sharing and plots do with what they cannot use: one line, and nothing is written."""

import json
import os
from pathlib import Path

import pytest
from bad_input import refusal
from conftest import TINY, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_study import CHILDREN, STUDY

from sddit_diffusers import (
    EDMHeunScheduler,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
    convert,
    plot,
    reproduce,
)
from sddit_diffusers.evaluation.figures import draw
from sddit_diffusers.evaluation.studies import read_study, slug
from sddit_diffusers.evaluation.tables import Results, markdown
from sddit_diffusers.reproduce import ReproduceConfig, Reproduction

STUDIES = Path(reproduce.__file__).parents[1] / "studies"
STEPS = {"title": "T", "kind": "steps", "paper": {"DiT": None}}
SAMPLER = STUDY["tables"][5]


# Studies


def with_run(name):
    return {"runs": {name: STUDY["runs"]["DiT"]}, "tables": [STEPS | {"paper": {name: None}}]}


def with_sampling(**arguments):
    return {"tables": [SAMPLER | {"samplings": {"A": arguments}, "paper": {"A": None}}]}


WRONG_STUDIES = {
    # Names that lead out of the folder, or onto other files of it.
    "run ..": (with_run(".."), ("'..'", "letter or digit")),
    "run .": (with_run("."), ("'.'", "letter or digit")),
    "run ../../x": (with_run("../../x"), ("'../../x'", "letter or digit")),
    "run without letters": (with_run("τ σ"), ("'τ σ'", "letter or digit")),
    "run empty": (with_run(""), ("''", "letter or digit")),
    "run hidden": (with_run(".speed"), ("'.speed'", "letter or digit")),
    "run long": (with_run("a" * 300), ("aaa", "at most 100")),
    "run results": (with_run("results.json"), ("results.json", "another name")),
    "run speeds": (with_run("Speeds.json"), ("speeds.json", "another name")),
    "run figure": (with_run("T.png"), ("t.png", "another name")),
    "run nul": (with_run("NUL"), ("'NUL'", "Windows")),
    "table ..": ({"tables": [STEPS | {"title": "..: x"}]}, ("'..'", "letter or digit")),
    "table results": ({"tables": [STEPS | {"title": "T"}, STEPS | {"title": "t: x"}]}, ("t.png", "another")),
    "sampling ..": (
        {"tables": [SAMPLER | {"samplings": {"..": {}}, "paper": {"..": None}}]},
        ("'..'", "letter or digit"),
    ),
    "samplings of one file": (
        {"tables": [SAMPLER, SAMPLER | {"title": "B", "samplings": {"n 2": {}}, "paper": {"n 2": None}}]},
        ("n 2", "N = 2", "other settings"),
    ),
    # The structure.
    "title": ({"title": 5}, ("title is 5", "text")),
    "seeds text": ({"seeds": "01"}, ("seeds", "list")),
    "seeds negative": ({"seeds": [-1]}, ("seeds[0] is -1", "0..4294967295")),
    "seeds huge": ({"seeds": [10**12]}, ("seeds[0] is 1000000000000",)),
    "seeds true": ({"seeds": [True]}, ("seeds[0] is True",)),
    "runs list": ({"runs": []}, ("runs is []", "object")),
    "run null": ({"runs": {"DiT": None}}, ("runs.DiT is None", "object")),
    "settings list": ({"settings": [1]}, ("settings is [1]",)),
    "tables object": ({"tables": {}}, ("tables is {}", "list")),
    "table text": ({"tables": ["x"]}, ("tables[0] is 'x'", "object")),
    "table without kind": ({"tables": [{"title": "T", "paper": {}}]}, ("tables[0] has no 'kind'",)),
    "paper text": ({"tables": [STEPS | {"paper": {"DiT": "x"}}]}, ("paper.DiT is 'x'", "number")),
    "paper nan": ({"tables": [STEPS | {"paper": {"DiT": float("nan")}}]}, ("NaN",)),
    "columns": ({"tables": [STEPS | {"kind": "metrics", "columns": "kl"}]}, ("columns is 'kl'", "list")),
    "sigmas zero": ({"tables": [STEPS | {"kind": "probe", "sigmas": [0]}]}, ("sigmas are [0]", "above 0")),
    "unknown key": ({"tables": [STEPS | {"colour": 1}]}, ("colour",)),
    "setting": (
        {"tables": [STEPS | {"kind": "setting", "setting": "method"}]},
        ("method is 'dit'", "a number or 'student'"),
    ),
    # Samplings.
    "sampling unknown": (with_sampling(steps=2), ("'A'", "steps", "num_inference_steps")),
    "sampling labels": (with_sampling(class_labels=[1]), ("'A'", "class_labels")),
    "sampling steps": (with_sampling(num_inference_steps=0), ("num_inference_steps is 0", "1..")),
    "sampling guidance": (with_sampling(guidance_scale="2"), ("guidance_scale is '2'", "number")),
    "sampling interval": (with_sampling(guidance_interval=[3, 1]), ("guidance_interval is [3, 1]", "high")),
    "sampling interval of one": (with_sampling(guidance_interval=[3]), ("guidance_interval is [3]",)),
    "sampling churn": (with_sampling(s_churn=-1), ("s_churn is -1", "at least 0")),
    "sampling noise": (with_sampling(s_noise="x"), ("s_noise is 'x'", "number")),
    "scheduler list": (with_sampling(scheduler=[]), ("scheduler is []", "object")),
    "scheduler unknown": (with_sampling(scheduler={"roh": 3}), ("'A'", "roh", "rho")),
    "scheduler text": (with_sampling(scheduler={"rho": "x"}), ("'A'", "rho is 'x'")),
    "scheduler choice": (with_sampling(scheduler={"sigma_schedule": "x"}), ("sigma_schedule is 'x'",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_STUDIES)
def test_a_wrong_study_is_refused_before_anything_is_trained(case, tmp_path, capsys):
    changes, words = WRONG_STUDIES[case]
    path = tmp_path / "small.json"
    path.write_text(json.dumps(STUDY | changes))
    with refusal(capsys, "small.json is no study", *words, untouched=tmp_path):
        reproduce.main([str(path), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", ("no JSON",)),
        (b"[" * 100_000, ("no JSON",)),
        (b'{"title": ' + b"9" * 5000 + b"}", ("no JSON",)),
        (b"null", ("None", "object")),
    ],
)
def test_a_file_that_is_no_study_is_refused(content, words, tmp_path, capsys):
    (tmp_path / "it.json").write_bytes(content)
    with refusal(capsys, "it.json is no study", *words, untouched=tmp_path):
        reproduce.main([str(tmp_path / "it.json"), "--output_dir", str(tmp_path / "out")])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield from places(inner, (*path, key))


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from(
        [(study, place) for study in (STUDY, CHILDREN) for place in places(study) if place]
    ),
    value=ANYTHING,
)
def test_a_study_with_anything_anywhere_is_read_and_told_of_or_refused(start, value, tmp_path_factory):
    study, place = json.loads(json.dumps(start))
    inner = study
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(study))
    try:
        read = read_study(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} is no study: ")
    else:
        assert markdown(read, Results()).startswith("# ")


@given(st.text(max_size=150))
def test_a_slug_is_one_name_in_its_folder(name):
    try:
        found = slug(name)
    except ValueError:
        return
    assert Path("folder", found).parent == Path("folder") and not found.startswith(".") and len(found) <= 100


def test_studies_of_today_keep_their_folders():
    names = {"SD-DiT": "sd-dit", "without L_D": "without-l-d", "tau_T 0.09": "tau-t-0.09", "mask 0": "mask-0",
             "w = 1.5 in [0.28, 2.9]": "w-1.5-in-0.28-2.9", "beta 0.98": "beta-0.98"}  # fmt: skip
    assert {name: slug(name) for name in names} == names
    for path in STUDIES.glob("*.json"):
        study = read_study(path)
        assert all(slug(run) for run in study.runs) and all(table.name for table in study.tables)


def test_churn_is_among_a_sampling_s_arguments(tmp_path):
    path, arguments = tmp_path / "small.json", {"s_churn": 10, "s_tmin": 0.05, "s_tmax": 50, "s_noise": 1.003}
    path.write_text(json.dumps(STUDY | with_sampling(**arguments)))
    assert read_study(path).tables[0].samplings == {"A": arguments}


def test_dollars_in_names_are_drawn_as_they_are(tmp_path):
    path = tmp_path / "small.json"
    table = STEPS | {"title": r"T: $\frac$", "paper": {r"$\x$ | y": None}}
    path.write_text(json.dumps(STUDY | {"runs": {r"$\x$ | y": {}}, "tables": [table]}))
    study, results = read_study(path), Results()
    results.add(r"$\x$ | y", 0, ("score", 1), 2.0)
    draw(study.tables[0], study, results, tmp_path)
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert r"| $\x$ \| y | – | 2 |" in markdown(study, results)


def test_figures_replace_a_link_and_not_what_it_leads_to(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(STUDY | {"tables": [STEPS]}))
    (tmp_path / "mine.png").write_text("mine")
    (tmp_path / "t.png").symlink_to(tmp_path / "mine.png")
    study = read_study(path)
    draw(study.tables[0], study, Results(), tmp_path)
    assert (tmp_path / "mine.png").read_text() == "mine" and not (tmp_path / "t.png").is_symlink()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "-1"], ("seeds is -1", "0..4294967295")),
        (["--seeds", "1000000000000"], ("seeds is 1000000000000", "0..4294967295")),
        (["--seeds", "x"], ("'x'",)),
        (["--runs", "DiT\0"], ("runs is 'DiT\\x00'", "null")),
        (["--runs", "x" * 5000], ("There is no run 'xxx",)),
        (["--output_dir", "a\0b"], ("output_dir is 'a\\x00b'", "null")),
        (["--settings", "[" * 100_000], ("settings is", "JSON")),
        (["--settings", "[1]"], ("settings is '[1]'", "object")),
        (["--settings", '{"learning_rate": NaN}'], ("learning_rate", "nan")),
        (["--settings", '{"learning_rate": null}'], ("learning_rate", "null")),
        (["--settings", '{"": 1}'], ("error",)),
        (["--settings", '{"seeds": 1}'], ("--seeds",)),
        (["--report_onyl"], ("--report_onyl", "--report_only")),
        (["--report_only", "--output_dir", "small.json"], ("small.json",)),
        (["--report_only", "--output_dir", "/proc/none"], ("/proc/none",)),
    ],
)
def test_wrong_options_of_reproduce(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps(STUDY))
    with refusal(capsys, *words, untouched=tmp_path):
        reproduce.main(["small.json", "--output_dir", "out", *options])


@pytest.fixture
def begun(tmp_path):
    """A study's folder in which one run is complete, as far as its files tell."""
    (tmp_path / "small.json").write_text(json.dumps(STUDY))
    config = ReproduceConfig(output_dir=str(tmp_path / "out"), report_only=True)
    reproduction = Reproduction(config, tmp_path / "small.json")
    folder = reproduction.folder_of("DiT", 0)
    folder.mkdir(parents=True)
    reproduction.configs["DiT", 0].save(folder / "training_config.json")
    (folder / "metrics.jsonl").write_text('{"step": 4, "fid_pixels": 2.5}\n')
    for name in ("model_index.json", "README.md", "curves.png"):
        (folder / name).write_text("{}")
    return tmp_path / "out"


def report(folder):
    reproduce.main([str(folder.parent / "small.json"), "--output_dir", str(folder), "--report_only"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dit/seed-0/training_config.json", "[1]", ("training_config.json", "object")),
        ("dit/seed-0/training_config.json", "{", ("training_config.json", "no JSON")),
        ("dit/seed-0/metrics.jsonl", '{"step": 4, "fid_pixels": "x"}\n', ("dit/seed-0", "fid_pixels", "'x'")),
        ("dit/seed-0/metrics.jsonl", '{"step": 4, "fid_pixels": null}\n', ("dit/seed-0", "None")),
        ("dit/seed-0/metrics.jsonl", '{"step": 4}\n', ("dit/seed-0", "has no 'fid_pixels'")),
        ("dit/seed-0/probe.json", "{}", ("probe.json", "'of'")),
        ("dit/seed-0/probe.json", '{"of": [0.1], "found": [{"sigma": 1}]}', ("probe.json", "'probe'")),
        ("dit/seed-0/sampling-n-2.json", '{"of": {}, "found": "x"}', ("sampling-n-2.json", "number")),
        ("dit/seed-0/sampling-n-2.json", "NaN", ("sampling-n-2.json", "no JSON")),
        ("speeds.json", '{"of": [], "found": [1]}', ("speeds.json", "object")),
        ("speeds.json", '{"of": [], "found": {"DiT": "fast"}}', ("speeds.json", "number")),
        ("speeds.json", "\0", ("speeds.json", "no JSON")),
    ],
)
def test_damaged_files_of_a_study_are_named(name, content, words, begun, capsys):
    report(begun)
    (begun / name).write_text(content)
    with refusal(capsys, *words, untouched=begun):
        report(begun)


def test_what_was_measured_otherwise_is_not_told(begun):
    for of, expected in (({"num_inference_steps": 2}, [7.5]), ({"num_inference_steps": 3}, [])):
        kept = {"of": of, "found": 7.5}
        (begun / "dit/seed-0/sampling-n-2.json").write_text(json.dumps(kept))
        report(begun)
        tables = json.loads((begun / "results.json").read_text())["tables"]
        assert tables[5]["rows"][0] == ["N = 2", None, expected]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(begun, capsys):
    begun.chmod(0o500)
    try:
        with refusal(capsys, "results.md", "Permission denied"):
            report(begun)
    finally:
        begun.chmod(0o700)


# Conversions and plots


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "a[1]*"
    SDDiTPipeline(randomize(SDDiTTransformer2DModel(**TINY)), EDMHeunScheduler()).save_pretrained(folder)
    return folder


SINGLE = {"_class_name": "SDDiTTransformer2DModel", **TINY}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": ["x"]}, ("holds a ['x']", "allowed")),
        ({"_class_name": 5}, ("holds a", "allowed")),
        ({"num_layers": -1}, ("num_layers is -1", "1..65535")),
        ({"num_layers": 10**12}, ("num_layers is 1000000000000", "1..65535")),
        ({"num_layers": 60_000}, ("num_layers is 60000", "weights")),
        ({"num_layers": "3"}, ("num_layers is '3'", "whole number")),
        ({"num_layers": True}, ("num_layers is True",)),
        ({"num_attention_heads": 0}, ("num_attention_heads is 0",)),
        ({"attention_head_dim": [8]}, ("attention_head_dim is [8]",)),
        ({"sample_size": 65_000, "patch_size": 1}, ("sample_size is 65000", "1024")),
        ({"sample_size": 1, "patch_size": 2}, ("sample_size is 1",)),
        ({"mlp_ratio": 1e12}, ("mlp_ratio is 1000000000000.0", "64")),
        ({"mlp_ratio": float("nan")}, ("NaN",)),
        ({"mlp_ratio": -4}, ("mlp_ratio is -4",)),
        ({"num_classes": None}, ("num_classes is None",)),
        ({"out_channels": "x"}, ("out_channels is 'x'",)),
    ],
)
def test_single_files_of_impossible_networks(changes, words, transformer, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_file(transformer.state_dict(), path, {"config": json.dumps(SINGLE | changes)})
    with refusal(capsys, *words, untouched=tmp_path):
        convert.main([str(path), str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "mdt"], ("method is 'mdt'", "'maskdit'")),
        (["--num_classes", "-1"], ("num_classes is -1", "at least 0")),
        (["--num_classes", "1000000000000"], ("num_classes is 1000000000000", "at most")),
        (["--vae", "a\0b"], ("vae is 'a\\x00b'", "null")),
        (
            ["--transformer", '{"num_decoder_layers": 1000000000000}'],
            ("num_decoder_layers is 1000000000000",),
        ),
        (["--transformer", '{"num_layers": Infinity}'], ("num_layers", "inf")),
    ],
)
def test_wrong_options_of_convert(options, words, pipeline, tmp_path, capsys):
    with refusal(capsys, *words, untouched=tmp_path):
        convert.main([str(pipeline), str(tmp_path / "out"), *options])


def test_a_full_disk_is_told_with_the_path(pipeline, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EDMHeunScheduler, "save_pretrained", full)
    with refusal(capsys, "No space left on device", str(tmp_path / "out"), untouched=tmp_path):
        convert.main([str(pipeline), str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--columns", "0"], ("columns is 0", "1..1000")),
        (["--columns", "1000000000000"], ("columns is 1000000000000", "1..1000")),
        (["--num_inference_steps", "0"], ("num_inference_steps is 0", "at least 1")),
        (["--num_inference_steps", "1000000000000"], ("num_inference_steps is 1000000000000", "at most")),
        (["--guidance_scale", "nan"], ("guidance_scale is nan", "finite")),
        (["--guidance_scale", "inf"], ("guidance_scale is inf", "finite")),
        (["--guidance_interval", "nan", "1"], ("guidance_interval is nan",)),
        (["--guidance_interval", "5", "1"], ("guidance_interval is [5.0, 1.0]", "highest")),
        (["--guidance_interval", "5"], ("guidance_interval is [5.0]", "highest")),
        (["--class_labels", "x\0"], ("class_labels is 'x\\x00'", "null")),
        (["--class_labels", "99"], ("99", "0 to 3")),
        (["--output", "grid"], ("output is grid", ".png")),
        (["--output", "a\0.png"], ("null",)),
        (["--output", "none/grid.png", "--num_inference_steps", "1", "--columns", "1"], ("none/", "No such")),
    ],
)
def test_wrong_options_of_plot(options, words, pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refusal(capsys, "plot: error: ", *words, untouched=tmp_path):
        plot.main(["grid", str(pipeline), *options])


def test_a_picture_replaces_a_link_and_not_what_it_leads_to(pipeline, tmp_path):
    mine, link = tmp_path / "mine.png", tmp_path / "grid[1]*.png"
    mine.write_text("mine")
    link.symlink_to(mine)
    plot.main(["grid", str(pipeline), "--output", str(link), "--columns", "1", "--num_inference_steps", "1"])
    assert mine.read_text() == "mine" and link.is_file() and not link.is_symlink()


def test_brackets_and_stars_in_paths_are_letters(pipeline, tmp_path):
    convert.main([str(pipeline), str(tmp_path / "[b]*.safetensors")])
    convert.main([str(tmp_path / "[b]*.safetensors"), str(tmp_path / "c[*]")])
    assert (tmp_path / "c[*]/model_index.json").is_file()
