"""What generation and evaluation cannot use ends in one line that names it, and nothing is written."""

import json
import shutil

import numpy as np
import pytest
from bad_input import refusal
from conftest import TINY, randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel, evaluate, generate

FAR = 10**12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    pipe = SDDiTPipeline(randomize(SDDiTTransformer2DModel(**TINY)), EDMHeunScheduler())
    pipe.save_pretrained(folder)
    return folder


def generation(model, folder, *options):
    options = ["--model", model, "--output_dir", folder, "--num_samples", 2, *options]
    generate.main([str(option) for option in [*options, "--num_inference_steps", 2]])


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("seed", [2**64], f"seed is {2**64}; it must be in 0..{2**63 - 1}"),
        ("seed", [2**63 - 1], f"that of the last image must be at most {2**63 - 1}"),
        ("seed", ["one"], "seed"),
        ("batch_size", [FAR], "batch_size is 1000000000000; it must be at most 2147483647"),
        ("batch_size", [0], "batch_size is 0; it must be at least 1"),
        ("guidance_scale", ["nan"], "guidance_scale is nan; it must be a finite number"),
        ("guidance_scale", ["inf"], "guidance_scale is inf; it must be a finite number"),
        ("guidance_interval", ["nan", 1], "guidance_interval is nan; it must be"),
        ("guidance_interval", [1, "nan"], "guidance_interval is nan; it must be"),
        ("guidance_interval", [-1, 1], "guidance_interval is -1.0; it must be at least 0"),
        ("s_churn", ["nan"], "s_churn is nan"),
        ("s_churn", [-1], "s_churn is -1.0; it must be at least 0"),
        ("s_tmin", ["inf"], "s_tmin is inf"),
        ("s_tmax", [-1], "s_tmax is -1.0; it must be at least 0"),
        ("s_noise", ["nan"], "s_noise is nan"),
        ("class_labels", [2**31], "Class label 2147483648 is out of range; allowed are integers from 0 to 3"),
        ("class_labels", [FAR], "Class label 1000000000000 is out of range"),
        ("class_labels", ["9" * 5000], "Unknown class name"),
        ("class_labels", ["²"], "Unknown class name '²'"),
        ("class_labels", ["٣"], "Unknown class name"),
        ("class_labels", [""], "Unknown class name ''"),
        ("class_labels", ["random", "1"], "Unknown class name 'random'"),
        ("scheduler_options", ['{"sigma_data": 0}'], "sigma_data of scheduler_options is 0; it must be"),
        (
            "scheduler_options",
            ['{"rho": "x"}'],
            "rho of scheduler_options is 'x'; it must be a number",
        ),
        ("scheduler_options", ['{"rho": true}'], "rho of scheduler_options is True"),
        ("scheduler_options", ['{"sigma_max": -1}'], "sigma_max of scheduler_options is -1"),
        ("scheduler_options", ['{"sigma_max": null}'], "sigma_max of scheduler_options is None"),
        ("scheduler_options", ['{"sigma_max": NaN}'], "sigma_max of scheduler_options is nan"),
        ("scheduler_options", ['{"sigma_max": 1e-9}'], "The scheduler's settings cannot be used"),
        ("scheduler_options", ['{"rho": 1e-300}'], "The scheduler's settings cannot be used"),
        ("scheduler_options", ['{"sigma_schedule": 1}'], "sigma_schedule of scheduler_options is 1"),
        ("scheduler_options", ['{"sigma_schedule": "x"}'], "sigma_schedule is 'x'; it must be one of"),
        ("scheduler_options", ["[" * 9999], "which is no JSON"),
        ("scheduler", ["EDMNone"], "There is no EDM scheduler 'EDMNone'"),
        ("format", ["npz", "a\0"], "format"),
        ("model", ["a\0b"], "text has no null bytes"),
        ("output_dir", ["a\0b"], "text has no null bytes"),
        ("output_dir", [__file__], "cannot be written"),
        ("output_dir", [f"{__file__}/out"], "cannot be written"),
    ],
)
def test_generation(model, tmp_path, capsys, name, values, allowed):
    with refusal(capsys, allowed, untouched=tmp_path):
        generation(model, tmp_path / "out", f"--{name}", *values)


RECORDS = ["", "{", "[]", "3", "null", "{}", '{"settings": []}', '{"settings": NaN}', "[" * 9999, "\udcff"]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", ["generation.json", ".generating/settings.json"])
def test_foreign_records(model, tmp_path, capsys, name, record):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(record.encode(errors="surrogateescape"))
    with refusal(capsys, str(path), "is no record of a generation", untouched=tmp_path):
        generation(model, tmp_path / "out")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(record=JSON | st.fixed_dictionaries({"settings": JSON}))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_as_a_record(model, tmp_path, capsys, record):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/generation.json").write_text(json.dumps(record))
    with refusal(capsys, str(tmp_path / "out"), untouched=tmp_path):
        generation(model, tmp_path / "out")


@pytest.fixture
def scored(tmp_path):
    """A folder with samples, and some references that are none."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    np.savez(tmp_path / "one.npz", arr_0=pixels[:1])
    np.savez(tmp_path / "three.npz", arr_0=pixels[:3])
    np.savez(tmp_path / "none.npz", arr_0=pixels[:0])
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "ragged.npz", mu=np.zeros(2048), sigma=np.eye(3))
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    np.savez(tmp_path / "objects.npz", mu=np.full(4, None), sigma=np.eye(4))
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.pkl").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one.npz", "samples.npz"], "one.npz has 1 images; scores need at least 2"),
        (["none.npz", "samples.npz"], "arr_0 of none.npz is uint8 of shape (0, 8, 8, 3)"),
        (["samples.npz", "one.npz"], "one.npz has 1 images; scores need at least 2"),
        (["samples.npz", "three.npz"], "precision and recall need at least 4"),
        (["three.npz", "samples.npz", "--metrics", "recall"], "precision and recall need at least 4"),
        (["samples.npz", "empty.npz"], "empty.npz cannot be read"),
        (["samples.npz", "text.npz"], "text.npz cannot be read"),
        (["samples.npz", "empty.pkl"], "empty.pkl cannot be read"),
        (["samples.npz", "nan.npz"], "nan.npz is not finite"),
        (["samples.npz", "objects.npz"], "objects.npz cannot be read"),
        (["samples.npz", "ragged.npz"], "ragged.npz have shapes"),
        (["samples.npz", "wide.npz", "--extractor", "inception"], "statistics of 3 features for fid"),
        (["empty.npz", "samples.npz"], "empty.npz cannot be read"),
        (["samples.npz", "samples.npz", "--resolution", -1], "resolution is -1; it must be in 0.."),
        (["samples.npz", "samples.npz", "--resolution", FAR], "resolution is 1000000000000"),
        (["samples.npz", "digits", "--resolution", 1], "1 x 1, and the samples 8 x 8"),
        (["samples.npz", "samples.npz", "--batch_size", FAR], "batch_size is 1000000000000"),
        (["samples.npz", "samples.npz", "--batch_size", 0], "batch_size is 0"),
        (["samples.npz", "samples.npz", "--output", "folder"], "which is a folder; it must be a file"),
        (["samples.npz", "samples.npz", "--output", "none/a.json"], "whose folder is not there"),
        (["samples.npz", "samples.npz", "--output", "a\0"], "text has no null bytes"),
        (["samples.npz", "samples.npz", "--cache_dir", "text.npz"], "text.npz"),
        (["samples.npz", "samples.npz", "--metrics", "fid", "x"], "metrics is 'x'; it must be 'fid'"),
        (["samples.npz", "a\0"], "The dataset 'a\\x00' cannot be loaded"),
        (["samples.npz", "samples.npz", "--probe_sigmas", "nan"], "probe_sigmas is nan"),
        (["samples.npz", "samples.npz", "--probe_sigmas", "inf"], "probe_sigmas is inf"),
        (["samples.npz", "samples.npz", "--probe_sigmas", 0], "they must be above 0"),
        (["samples.npz", "samples.npz", "--probe_samples", 4], "probe_samples is 4; it must be at least 5"),
    ],
)
def test_evaluation(scored, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(scored)
    extractor = [] if "--extractor" in arguments else ["--extractor", "pixels"]
    with refusal(capsys, words, untouched=scored):
        evaluate.main([str(argument) for argument in [*arguments, *extractor]])


@pytest.mark.parametrize("record", ["", "[]", "NaN", "[" * 9999])
def test_samples_with_a_foreign_record(scored, capsys, record):
    (scored / "generation.json").write_text(record)
    with refusal(capsys, "generation.json is no record of a generation", untouched=scored):
        evaluate.main([*[str(scored / "samples.npz")] * 2, "--extractor", "pixels"])
