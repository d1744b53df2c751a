"""What a run learns and leaves: on the digits, with a network of a few thousand weights."""

import json
import re

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import thorough
from PIL import Image
from small_runs import NETWORK, make_trainer, train

import train_sddit
from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.data.pictures import ImageDataset
from sddit_diffusers.models.transformer_sddit import SDDiTBlock
from sddit_diffusers.training.metrics import read_metrics


@pytest.mark.figures
def test_leaves_a_pipeline_and_what_people_look_at(tmp_path, capsys, monkeypatch):
    options = ["--validation_steps", 2, "--num_validation_images", 10]
    metrics = train(tmp_path / "run", "--max_train_steps", 3, *options)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for name in ("samples.png", "samples-2.png", "curves.png", "model_index.json", "training_config.json"):
        assert (tmp_path / "run" / name).is_file()
    assert np.asarray(Image.open(tmp_path / "run/curves.png").convert("L")).std() > 5
    assert not list((tmp_path / "run").rglob("*.bin")) and not list((tmp_path / "run").rglob("*.pt"))

    lines = re.search(r"Use it:\n\n((    .+\n){3})", capsys.readouterr().out).group(1)
    assert 'pipe(class_labels=["7"], guidance_scale=1.5)' in lines  # by its name, as the card does
    assert lines.splitlines()[-1].strip() in (tmp_path / "run/README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in lines.splitlines()), {})
    assert (tmp_path / "sample.png").is_file()
    assert SDDiTPipeline.from_pretrained(tmp_path / "run").id2label[7] == "7"


def test_learns(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 60, "--train_batch_size", 64)
    first, last = (np.mean([row["loss_generative"] for row in rows]) for rows in (metrics[:5], metrics[-5:]))
    assert last < 0.75 * first
    assert [row["teacher_temperature"] for row in metrics] == sorted(
        row["teacher_temperature"] for row in metrics
    )
    assert metrics[0]["teacher_momentum"] == pytest.approx(0.996) and metrics[-1]["teacher_momentum"] > 0.9989


def test_saves_the_averaged_weights(tmp_path):
    trainer = make_trainer(tmp_path, "--max_train_steps", 12)
    average, history = None, []
    step = trainer.ema.step

    def watched(parameters):
        parameters = list(parameters)
        history.append([parameter.detach().clone() for parameter in parameters])
        step(parameters)

    trainer.ema.step = watched
    trainer.run()
    for i, weights in enumerate(history):
        decay = min(0.9999, (1 + i) / (10 + i)) if i else 0.0
        average = weights if average is None else [
            decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)
        ]  # fmt: skip
    saved = SDDiTPipeline.from_pretrained(tmp_path).transformer
    torch.testing.assert_close(list(saved.parameters()), average, rtol=1e-4, atol=1e-6)
    assert any((a - w).abs().max() > 1e-5 for a, w in zip(average, history[-1], strict=True))


def test_gradient_accumulation_changes_nothing(tmp_path):
    whole = train(tmp_path / "a", "--max_train_steps", 8, "--train_batch_size", 32)
    parts = train(
        tmp_path / "b", "--max_train_steps", 8, "--train_batch_size", 8, "--gradient_accumulation_steps", 4
    )
    for a, b in zip(whole, parts, strict=True):
        names = set(a) - {"prototypes_used"}  # counted in each micro-batch
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-5)


@pytest.mark.long
def test_compiled_blocks_train_alike(tmp_path, monkeypatch):
    compiled = []

    def compile(block, **options):
        compiled.append(block)
        torch.nn.Module.compile(block, backend="aot_eager", **options)  # traced, without a C++ compiler

    monkeypatch.setattr(SDDiTBlock, "compile", compile)
    plain = train(tmp_path / "a", "--max_train_steps", 4, "--gradient_checkpointing", "selective")
    traced = train(tmp_path / "b", "--max_train_steps", 4, "--compile")
    assert len(compiled) == 2 + 1 + 2  # student, its decoder, teacher
    for a, b in zip(plain, traced, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    SDDiTPipeline.from_pretrained(tmp_path / "b")


@pytest.mark.parametrize("method", ["sddit", *thorough("maskdit", "mdt")])
def test_one_compilation_serves_all_lengths(tmp_path, graphs, method):
    """Counted by what reaches the backend; torch gives up after eight."""
    network = (
        NETWORK if method != "mdt" else {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    )
    options = ["--method", method, "--transformer", json.dumps(network), "--mask_ratio", 0.9, "--compile"]
    options += ["--mask_ratio_schedule", "cosine", "--max_train_steps", 14, "--output_dir", tmp_path]
    options += ["--num_validation_images", 0, "--evaluation_steps", 0, "--train_batch_size", 4]
    train_sddit.main([*map(str, options)])
    lengths = {round(16 * (1 - row["mask_ratio"])) for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert len(lengths) > 8 and len(graphs) < 2 * len(lengths)


@pytest.mark.thorough
def test_bfloat16_follows_float32(tmp_path):
    full = train(tmp_path / "a", "--max_train_steps", 40)
    AcceleratorState._reset_state(True)
    half = train(tmp_path / "b", "--max_train_steps", 40, "--mixed_precision", "bf16")
    for name in ("loss_generative", "loss_discriminative"):
        a, b = (np.mean([row[name] for row in rows[-10:]]) for rows in (full, half))
        assert b == pytest.approx(a, rel=0.02)


def test_pictures_of_a_folder(tmp_path):
    folder = tmp_path / "data" / "train"
    for i in range(40):
        (folder / "cat dog".split()[i % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8))
        picture.save(folder / "cat dog".split()[i % 2] / f"{i}.png")
    network = json.dumps(NETWORK | {"in_channels": 3})
    options = ["--dataset_name", tmp_path / "data", "--max_train_steps", 3, "--transformer", network]
    train(tmp_path / "run", *options, "--dataloader_num_workers", 2)
    pipe = SDDiTPipeline.from_pretrained(tmp_path / "run")
    assert pipe(["dog"], num_inference_steps=2).images[0].mode == "RGB"
    assert pipe.transformer.config.num_classes == 2


def test_validation_leaves_the_weights_alone(tmp_path):
    options = ["--validation_steps", 1, "--num_validation_images", 10]
    assert train(tmp_path / "a", "--max_train_steps", 4, *options) == train(
        tmp_path / "b", "--max_train_steps", 4
    )


def test_tensorboard(tmp_path):
    train(tmp_path, "--max_train_steps", 2, "--report_to", "tensorboard")
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_without_labels_and_without_discrimination(tmp_path):
    metrics = train(tmp_path, "--max_train_steps", 2, "--label_column", "", "--discriminative_weight", 0)
    assert not {"loss_discriminative", "teacher_momentum"} & set(metrics[0])
    assert SDDiTPipeline.from_pretrained(tmp_path).transformer.config.num_classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_column", "picture"], "digits has no column 'picture'; its columns are image, label"),
        (["--dataset_name", "./nowhere"], "There is no dataset folder ./nowhere"),
        (
            ["--train_batch_size", "2000"],
            "There are 1797 rows to train on, fewer than one global batch of 2000",
        ),
        (["--resume_from_checkpoint", "run/checkpoint-7"], "There is no checkpoint run/checkpoint-7"),
        (["--report_to", "clouds"], "report_to is 'clouds'"),
        (["--mixed_precision", "fp16"], "mixed_precision is 'fp16', which needs a GPU"),
    ],
)
def test_mistakes_stop_it_before_training(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, *options)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_unwritable_folder_stops_it_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="The output folder .*file/run cannot be written: Not a directory"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named(tmp_path, monkeypatch, workers):
    decode = ImageDataset._decode
    broken = {"bytes": b"no picture", "path": "five.png"}
    monkeypatch.setattr(
        ImageDataset, "_decode", lambda self, i, file: decode(self, i, broken if i == 5 else file)
    )
    with pytest.raises(SystemExit, match=r"Row 5 of digits \(five.png\) cannot be read as a picture"):
        train(
            tmp_path, "--max_train_steps", 200, "--train_batch_size", 64, "--dataloader_num_workers", workers
        )
