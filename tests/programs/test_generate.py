"""Images by seed: the same whatever makes them, and however often it is stopped."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from bad_input import refusal
from conftest import TINY, randomize
from datasets import load_dataset
from PIL import Image
from processes import launch

from sddit_diffusers import SDDiTPipeline, SDDiTTransformer2DModel, files, generate
from sddit_diffusers.evaluation.image_sets import open_images
from sddit_diffusers.pipelines.loading import sha256_of_weights
from sddit_diffusers.pipelines.ode import Dopri5Sampler
from sddit_diffusers.pipelines.sampling import class_of
from sddit_diffusers.seeds import generator_for


@pytest.fixture
def model(pipe, tmp_path):
    """A saved pipeline, of widths that CPU kernels do not cut."""
    widths = {"attention_head_dim": 16, "decoder_attention_head_dim": 16}
    pipe.register_modules(transformer=randomize(SDDiTTransformer2DModel(**TINY | widths)))
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(model, folder, *options):
    options = ["--model", model, "--output_dir", folder, "--num_inference_steps", 3, *options]
    generate.main([str(option) for option in options])
    return folder


def run_solver(model, folder, *options):
    """As [`run`], without a number of steps."""
    options = ["--model", model, "--output_dir", folder, *options]
    generate.main([str(option) for option in options])
    return folder


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "generation.json"
    }


WHOLE = {}


def content_of_twelve(model):
    """Of a generation of twelve images that nothing stopped; the model of each test is the same."""
    if not WHOLE:
        WHOLE.update(content(run(model, model.parent / "whole", "--num_samples", 12)))
    return WHOLE


@pytest.mark.process
def test_the_same_bytes_at_any_batch_size_and_number_of_processes(model, tmp_path):
    options = ["--num_samples", 64, "--format", "npz", "png"]
    whole = content(run(model, tmp_path / "64", *options, "--batch_size", 64))
    assert content(run(model, tmp_path / "7", *options, "--batch_size", 7)) == whole
    command = ["--model", model, "--output_dir", tmp_path / "two", "--num_inference_steps", 3, *options]
    result = launch(2, "-m", "sddit_diffusers.generate", *command, "--batch_size", 16)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "two") == whole and len(whole) == 1 + 64 + 1
    assert json.loads((tmp_path / "two/generation.json").read_text())["made_with"]["processes"] == 2


def test_an_image_is_that_of_its_seed_and_label(model, pipe, tmp_path):
    folder = run(model, tmp_path / "out", "--num_samples", 5, "--seed", 30, "--format", "png", "npz")
    labels = [int(torch.randint(4, (), generator=generator_for(30 + i, 1))) for i in range(5)]
    arrays = np.load(folder / "samples.npz")
    assert arrays["arr_1"].tolist() == labels and len(set(labels)) > 1
    for i in (0, 4):
        image = pipe(
            [labels[i]],
            generator=torch.Generator().manual_seed(30 + i),
            num_inference_steps=3,
            output_type="pt",
        ).images[0]
        # 127.5 x + 128, truncated, of x in -1..1
        expected = np.floor((image.double().numpy() * 2 - 1) * 127.5 + 128).clip(0, 255)
        difference = np.abs(arrays["arr_0"][i].transpose(2, 0, 1) - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02  # a batch of one rounds otherwise
        png = np.asarray(Image.open(folder / f"images/00000/{i:08d}.png"))
        np.testing.assert_array_equal(png, arrays["arr_0"][i])
    rows = load_dataset("imagefolder", data_dir=str(folder / "images"), split="train")
    assert rows["label"] == labels


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["batch", "block", "picture", "npz", "record"])
def test_stopped_at_any_moment_it_ends_with_the_same_files(model, tmp_path, monkeypatch, moment):
    options = ["--num_samples", 20, "--batch_size", 4, "--format", "npz", "png"]
    whole = content(run(model, tmp_path / "whole", *options))
    place, calls = (
        {
            "batch": (generate, "sample"),
            "block": (np, "save"),
            "picture": (generate, "_save_picture"),
            "npz": (np.lib.format, "write_array_header_1_0"),
            "record": (generate.Generation, "_device_name"),
        }[moment],
        [],
    )
    original = getattr(*place)

    def killed(*arguments, **keywords):
        calls.append(None)
        if len(calls) == 3 or moment in ("npz", "record"):
            raise Killed
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*place, killed)
        run(model, tmp_path / "killed", *options)
    assert not (tmp_path / "killed/generation.json").exists()
    with pytest.raises(ValueError, match="killed is not complete: the command that generates it goes on"):
        open_images(str(tmp_path / "killed"))
    made = []
    monkeypatch.setattr(generate, "sample", lambda *a, **k: made.append(len(a[1])) or sample(*a, **k))
    run(model, tmp_path / "killed", *options[:2], "--batch_size", 3, *options[4:])
    assert content(tmp_path / "killed") == whole
    assert sum(made) == (12 if moment in ("batch", "block") else 0)
    run(model, tmp_path / "killed", *options)  # nothing is left to do
    assert sum(made) == (12 if moment in ("batch", "block") else 0)


sample = generate.sample


def labels_of(pipe, *labels, count=400, seed=0):
    return [class_of(pipe, list(labels), seed, i) for i in range(count)]


def test_labels(pipe):
    drawn = labels_of(pipe, "random")
    assert set(drawn) == {0, 1, 2, 3} and np.bincount(drawn).std() > 0
    assert labels_of(pipe, "random", count=399, seed=1) == drawn[1:]  # an image's label is of its seed
    balanced = labels_of(pipe, "balanced")
    assert np.bincount(balanced).tolist() == [100] * 4 and balanced != sorted(balanced)
    assert balanced[:4] != balanced[4:8] or balanced[4:8] != balanced[8:12]
    assert labels_of(pipe, "3", "goldfish", "0", count=5) == [3, 2, 0, 3, 2]
    assert set(labels_of(pipe, "none")) == {4}
    pipe.register_modules(transformer=SDDiTTransformer2DModel(**TINY | {"num_classes": 0}))
    assert set(labels_of(pipe, "random")) == {0}
    with pytest.raises(ValueError, match="Class label 0 is out of range; .* the model has no classes"):
        labels_of(pipe, "0")


def test_sampler_guidance_and_precision_are_recorded_and_act(model, tmp_path):
    """Each setting changes the images, and the record says what made them."""
    settings = {
        "plain": [],
        "guided": ["--guidance_scale", 3],
        "interval": ["--guidance_scale", 3, "--guidance_interval", 1, 10],
        "steps": ["--num_inference_steps", 5],
        "rho": ["--scheduler_options", '{"rho": 3.0}'],
        "euler": ["--scheduler", "EDMEulerScheduler"],
        "bf16": ["--dtype", "bfloat16"],
    }
    images = {}
    for name, options in settings.items():
        folder = run(model, tmp_path / name, "--num_samples", 2, "--class_labels", 1, *options)
        images[name] = np.load(folder / "samples.npz")["arr_0"].tobytes()
        record = json.loads((folder / "generation.json").read_text())
        assert record["settings"]["scheduler_config"]["rho"] == (3.0 if name == "rho" else 7.0)
    assert len(set(images.values())) == len(images)
    record = json.loads((tmp_path / "interval/generation.json").read_text())
    assert record["settings"]["guidance_interval"] == ["1.0", "10.0"] and record["seeds"] == [0, 1]
    euler = json.loads((tmp_path / "euler/generation.json").read_text())
    assert euler["settings"]["scheduler_config"]["class"] == "EDMEulerScheduler"
    assert len(record["files_sha256"]["samples.npz"]) == len(record["settings"]["transformer_sha256"]) == 64


def test_steps_are_the_pipelines_own_where_none_are_given(pipe, tmp_path):
    pipe.scheduler.register_to_config(num_inference_steps=3)
    pipe.save_pretrained(tmp_path / "three")
    options = ["--model", str(tmp_path / "three"), "--num_samples", "2", "--output_dir"]
    generate.main([*options, str(tmp_path / "own")])
    folder = run(tmp_path / "three", tmp_path / "given", "--num_samples", 2)
    records = [json.loads((path / "generation.json").read_text()) for path in (tmp_path / "own", folder)]
    assert content(tmp_path / "own") == content(folder) and records[0]["settings"] == records[1]["settings"]
    assert records[0]["settings"]["num_inference_steps"] == 3
    assert "num_inference_steps" not in records[0]["settings"]["scheduler_config"]  # as folders were before


def test_grey_pictures_are_grey_in_png_and_rgb_in_npz(pipe, tmp_path):
    pipe.register_modules(transformer=randomize(SDDiTTransformer2DModel(**TINY | {"in_channels": 1})))
    pipe.save_pretrained(tmp_path / "grey")
    folder = run(tmp_path / "grey", tmp_path / "out", "--num_samples", 3, "--format", "npz", "png")
    array = np.load(folder / "samples.npz")["arr_0"]
    assert array.shape == (3, 8, 8, 3) and (array == array[..., :1]).all()
    picture = Image.open(folder / "images/00000/00000002.png")
    assert picture.mode == "L" and (np.asarray(picture) == array[2, ..., 0]).all()


def test_other_images_are_never_mixed_in(model, tmp_path, capsys):
    run(model, tmp_path / "out", "--num_samples", 2)
    message = "holds other images (num_samples: 2 there, 3 here); choose another --output_dir"
    with refusal(capsys, message, untouched=tmp_path):
        run(model, tmp_path / "out", "--num_samples", 3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with refusal(capsys, "holds other files", untouched=tmp_path):
        run(model, tmp_path / "other")


def test_two_generations_in_one_folder(model, tmp_path, capsys, monkeypatch):
    """The second is refused, whatever it would make, and the first goes on."""
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    refused = []

    def second(*arguments, **keywords):
        if not refused:
            refused.append(True)
            for options in ([], ["--num_samples", 3]):
                with refusal(capsys, f"{tmp_path / 'out'} is in use by process", untouched=tmp_path):
                    run(model, tmp_path / "out", *options)
        return sample(*arguments, **keywords)

    monkeypatch.setattr(generate, "sample", second)
    run(model, tmp_path / "out", "--num_samples", 2)
    assert refused and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "generation.json", "samples.npz",
    ]  # fmt: skip


def stopped_after_two_batches(model, folder, *options, run=run):
    """A generation that was killed when two batches were made, by default images 0 to 7."""
    made = []

    def killed(*arguments, **keywords):
        if len(made) == 2:
            raise Killed
        made.append(True)
        return sample(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(generate, "sample", killed)
        run(model, folder, "--num_samples", 12, "--batch_size", 4, *options)
    return folder / ".generating"


def shortened(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "shorter": shortened,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("images"),
    "other size": lambda path: np.save(path, np.zeros((4, 4, 4, 3), np.uint8)),
    "fewer": lambda path: np.save(path, np.zeros((3, 8, 8, 3), np.uint8)),
    "grey": lambda path: np.save(path, np.zeros((4, 8, 8, 1), np.uint8)),
    "floats": lambda path: np.save(path, np.zeros((4, 8, 8, 3), np.float32)),
    "objects": lambda path: np.save(path, np.full((4, 8, 8, 3), None), allow_pickle=True),
    "an archive": lambda path: np.savez(path.open("wb"), np.zeros((4, 8, 8, 3), np.uint8)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.unlink(), path.symlink_to("/none")),
    "no range": lambda path: path.rename(path.with_name("first.npy")),
    "backwards": lambda path: path.rename(path.with_name("000000004-000000000.npy")),
    "too far": lambda path: path.rename(path.with_name("000000010-000000014.npy")),
    "overlapping": lambda path: path.rename(path.with_name("000000002-000000006.npy")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_batches_are_made_again(model, tmp_path, capsys, damage):
    whole = content_of_twelve(model)
    batches = stopped_after_two_batches(model, tmp_path / "out")
    DAMAGES[damage](batches / "000000000-000000004.npy")
    capsys.readouterr()
    run(model, tmp_path / "out", "--num_samples", 12)
    assert content(tmp_path / "out") == whole
    warning = capsys.readouterr().err
    assert re.search(
        rf"^{re.escape(str(batches))}/\S+\.npy is damaged \(.*\); it is made again", warning, re.M
    )
    assert warning.count("is damaged") == (2 if damage == "overlapping" else 1)


def test_batches_without_settings_are_not_taken(model, tmp_path):
    whole = content_of_twelve(model)
    batches = stopped_after_two_batches(model, tmp_path / "out", "--seed", 5)
    (batches / "settings.json").unlink()
    run(model, tmp_path / "out", "--num_samples", 12)
    assert content(tmp_path / "out") == whole


def test_images_that_are_not_finite_end_it(model, pipe, tmp_path, capsys):
    """A model of NaN goes on where a good one stopped: the batches that are done stay, and none is black."""
    batches = stopped_after_two_batches(model, tmp_path / "out")
    done = {path.name: path.read_bytes() for path in batches.glob("*.npy")}
    nan = SDDiTPipeline.from_pretrained(model)
    for parameter in nan.transformer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    nan.save_pretrained(tmp_path / "nan")
    settings = json.loads((batches / "settings.json").read_text())
    settings["settings"]["transformer_sha256"] = sha256_of_weights(nan.transformer)
    (batches / "settings.json").write_text(json.dumps(settings))
    with refusal(capsys, "seed 8", "not finite", untouched=batches):
        run(tmp_path / "nan", tmp_path / "out", "--num_samples", 12)
    assert {path.name: path.read_bytes() for path in batches.glob("*.npy")} == done


def test_churn_is_handed_on_and_decides_the_images(model, tmp_path, monkeypatch, capsys):
    got = []
    monkeypatch.setattr(generate, "sample", lambda pipe, *images, **options: got.append(options) or sample(
        pipe, *images, **{name: options[name] for name in options if not name.startswith("s_")}
    ))  # fmt: skip
    run(model, tmp_path / "off", "--num_samples", 1, "--s_tmin", 1)  # which means nothing without churn
    assert not [name for name in got[0] if name.startswith("s_")]
    record = json.loads((tmp_path / "off/generation.json").read_text())
    assert not [name for name in record["settings"] if name.startswith("s_")]
    run(model, tmp_path / "off", "--num_samples", 1)
    run(model, tmp_path / "on", "--num_samples", 1, "--s_churn", 40, "--s_noise", 1.003)
    churn = {name: got[-1][name] for name in got[-1] if name.startswith("s_")}
    assert churn == {"s_churn": 40.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.003}
    with refusal(capsys, "holds other images", "s_churn: 40.0 there, None here", untouched=tmp_path):
        run(model, tmp_path / "on", "--num_samples", 1)


def test_churn_changes_the_images(model, tmp_path):
    images = {}
    for name, options in {
        "off": [],
        "on": ["--s_churn", 40],
        "7": ["--s_churn", 40, "--batch_size", 7],
    }.items():
        folder = run(model, tmp_path / name, "--num_samples", 20, *options)
        images[name] = np.load(folder / "samples.npz")["arr_0"].tobytes()
    assert images["on"] == images["7"] != images["off"]


def test_dopri5_makes_the_images_of_the_odes_solver(model, tmp_path):
    """The batch's size decides too, and the evaluations of all batches are told, those before a stop too."""
    options = ["--num_samples", 12, "--batch_size", 5, "--solver", "dopri5", "--rtol", 0.1]
    folder = run_solver(model, tmp_path / "whole", *options)
    record = json.loads((folder / "generation.json").read_text())
    images = np.load(folder / "samples.npz")["arr_0"]
    sampler, evaluations = Dopri5Sampler(SDDiTPipeline.from_pretrained(model), rtol=0.1), []
    for i in (0, 5, 10):
        seeds = range(i, min(i + 5, 12))
        labels = [class_of(sampler.pipe, ["random"], 0, seed) for seed in seeds]
        assert (sample(sampler, seeds, labels) == images[i : i + 5]).all()
        evaluations.append(sampler.evaluations)
    assert record["evaluations"] == sum(evaluations) / 3 > 7
    settings = record["settings"]
    assert (settings["solver"], settings["rtol"], settings["atol"]) == ("dopri5", 0.1, 1e-6)
    assert settings["batch_size"] == 5 and settings["num_inference_steps"] is None

    batches = stopped_after_two_batches(model, tmp_path / "stopped", *options[2:], run=run_solver)
    (batches / "0.evaluations").write_text(str(evaluations[0] + 3))
    assert content(run_solver(model, tmp_path / "stopped", *options)) == content(folder)
    resumed = json.loads((tmp_path / "stopped/generation.json").read_text())
    assert resumed == record | {"evaluations": record["evaluations"] + 1}


def test_without_a_solver_its_settings_are_not_recorded(model, tmp_path):
    record = json.loads((run(model, tmp_path / "out", "--num_samples", 1) / "generation.json").read_text())
    assert not {"solver", "rtol", "atol", "batch_size"} & set(record["settings"])
    assert "evaluations" not in record


def test_what_dopri5_does_not_take(model, tmp_path, capsys, monkeypatch):
    dopri5 = ["--num_samples", 2, "--solver", "dopri5"]
    for options, message in (
        (["--num_inference_steps", 3], "num_inference_steps is 3; dopri5 takes no num_inference_steps"),
        (["--s_churn", 40], "s_churn is 40.0; dopri5 takes no s_churn"),
        (["--scheduler", "EDMEulerScheduler"], "dopri5 takes no scheduler,"),
        (["--scheduler_options", '{"rho": 5}'], "dopri5 takes no scheduler_options"),
        (["--rtol", 0], "rtol is 0.0; it must be in"),
        (["--solver", "rk4"], "solver is 'rk4'; it must be 'dopri5'"),
    ):
        with refusal(capsys, message, untouched=tmp_path):
            run_solver(model, tmp_path / "out", *dopri5, *options)
    with refusal(capsys, "rtol is 0.1; it is a tolerance of --solver dopri5", untouched=tmp_path):
        run_solver(model, tmp_path / "out", "--num_samples", 2, "--rtol", 0.1)
    run_solver(model, tmp_path / "out", *dopri5, "--batch_size", 2)
    with refusal(capsys, "holds other images (batch_size: 2 there, 1 here)", untouched=tmp_path):
        run_solver(model, tmp_path / "out", *dopri5, "--batch_size", 1)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with refusal(capsys, "dopri5 needs torchdiffeq: pip install", untouched=tmp_path):
        run_solver(model, tmp_path / "other", *dopri5)


def test_folders_with_letters_of_patterns(model, tmp_path):
    whole = content(run(model, tmp_path / "whole", "--num_samples", 12, "--format", "npz", "png"))
    folder = tmp_path / "a[0]*?{b}"
    stopped_after_two_batches(model, folder, "--format", "npz", "png")
    assert content(run(model, folder, "--num_samples", 12, "--format", "npz", "png")) == whole
    assert len(open_images(str(folder))) == len(open_images(str(folder / "images"))) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class_labels", 4], "Class label 4 is out of range; allowed are integers from 0 to 3"),
        (["--class_labels", -1], "Class label -1 is out of range"),
        (["--class_labels", "gold fish"], "Unknown class name 'gold fish'"),
        (
            ["--guidance_interval", 2, 1],
            "guidance_interval is [2.0, 1.0]; it must be (lowest noise level, highest or inf)",
        ),
        (["--guidance_interval", 2], "it must be (lowest noise level, highest or inf)"),
        (["--scheduler", "DDIMScheduler"], "no EDM scheduler 'DDIMScheduler'; diffusers has EDMDPM"),
        (["--scheduler_options", '{"roh": 1}'], "has no setting 'roh'; it has sigma_min"),
        (["--scheduler_options", "rho=1"], "scheduler_options is 'rho=1', which is no JSON"),
        (["--scheduler_options", "3"], "scheduler_options is '3'; it must be a JSON object"),
        (["--dtype", "int8"], "dtype is 'int8'; it must be"),
        (["--format", "jpg"], "format is 'jpg'; it must be 'npz' or 'png'"),
        (["--num_samples", 0], "num_samples is 0; it must be at least 1"),
        (["--seed", -1], "seed is -1"),
        (["--model", "/none"], "The pipeline '/none' cannot be loaded"),
        (["--nmu_samples", 1], "unknown option --nmu_samples; nearest are --num_samples"),
    ],
)
def test_mistakes_have_one_line(model, tmp_path, capsys, options, message):
    with refusal(capsys, message, untouched=tmp_path):
        run(model, tmp_path / "out", *options)
