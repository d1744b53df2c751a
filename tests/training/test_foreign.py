"""Pipelines of diffusers through the same objectives: against diffusers' own schedulers and pipelines."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, thorough
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import distill_sddit
from sddit_diffusers import SDDiTPipeline, prepare_latents
from sddit_diffusers.data.latents import LatentDataset
from sddit_diffusers.training.distill_options import parse
from sddit_diffusers.training.distillation import (
    ExplicitSelfDistillation,
    ImplicitSelfDistillation,
    ProgressiveDistillation,
)
from sddit_diffusers.training.distilling import build_distillation, unexplained
from sddit_diffusers.training.foreign import DDIMProcess, ForeignDiT, ForeignUNet, Kept
from sddit_diffusers.training.memory import keep_products
from sddit_diffusers.training.metrics import read_metrics
from sddit_diffusers.training.trainer import training

CAPTIONS = ["a red cat", "a cat on a car", "rain"]
BETAS = dict(num_train_timesteps=100, beta_start=1e-3, beta_end=0.1)


def make_vae():
    return randomize(
        AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, sample_size=16,
            scaling_factor=0.3,
        )
    )  # fmt: skip


def make_dit(num_classes=4):
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=num_classes, norm_num_groups=4,
    )  # fmt: skip
    return randomize(model).eval()


def make_unet():
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8, attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return randomize(model).eval()


def make_text(folder):
    """A tokenizer that knows the letters, and a text encoder."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "c a", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    start, end = len(tokens) - 2, len(tokens) - 1
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=20, bos_token_id=start, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=20)
    return tokenizer, randomize(CLIPTextModel(config)).eval()


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents") / "dit"
    scheduler = DDIMScheduler(**BETAS, set_alpha_to_one=False, timestep_spacing="trailing")
    DiTPipeline(make_dit(), make_vae().half(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents") / "sd"
    tokenizer, text_encoder = make_text(folder.parent / "words")
    scheduler = PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True)
    StableDiffusionPipeline(
        make_vae(), text_encoder, tokenizer, make_unet(), scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def prepare(folder, vae, captions):
    """A folder of latents of twelve pictures, by class or with captions."""
    pictures, generator = folder / "pictures", np.random.default_rng(0)
    rows = []
    for i in range(12):
        place = pictures / "train" / ("" if captions else f"class-{i % 4}") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(place)
        rows.append(json.dumps({"file_name": place.name, "text": CAPTIONS[i % 3]}))
    if captions:
        (pictures / "train" / "metadata.jsonl").write_text("\n".join(rows))
    options = ["--dataset_name", pictures, "--vae", vae, "--output_dir", folder / "latents"]
    options += ["--resolution", 16, "--label_column", "text" if captions else "label"]
    prepare_latents.main([str(option) for option in options])
    return folder / "latents"


@pytest.fixture(scope="module")
def dit_latents(dit_folder, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("of-classes"), dit_folder, captions=False)


@pytest.fixture(scope="module")
def sd_latents(sd_folder, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("of-captions"), sd_folder, captions=True)


@pytest.fixture
def kept(tmp_path):
    """Of a StableDiffusionPipeline with captions."""
    tokenizer, text_encoder = make_text(tmp_path / "words")
    pipe = StableDiffusionPipeline(
        None, text_encoder, tokenizer, None, None, None, None, requires_safety_checker=False
    )
    return Kept(tmp_path, pipe, tuple(CAPTIONS))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 1])


def draw(objective):
    draws = objective.draw((3, 4, 8, 8), torch.Generator().manual_seed(1))
    return draws._replace(noise=draws.noise.double())


def rows_of(draws):
    """Timesteps of s and of the ends, the noise, and the guidance's scale, image by image."""
    step = draws.auxiliaries["step"]
    for t, ends, noise, scale in zip(draws.t, step.t, draws.noise, step.guidance_scale, strict=True):
        s, *ends = ((100 * torch.cat([t.flatten(), ends.flatten()])).round().long() - 1).tolist()
        yield s, ends, noise, scale.item()


def noise_of(scheduler, output, x, timestep):
    """The noise that a prediction stands for, by the definitions of the predictions."""
    alpha = scheduler.alphas_cumprod[timestep] ** 0.5
    sigma = (1 - scheduler.alphas_cumprod[timestep]) ** 0.5
    x0 = {  # v is alpha eps - sigma x0
        "epsilon": lambda: (x - sigma * output) / alpha,
        "v_prediction": lambda: alpha * x - sigma * output,
        "sample": lambda: output,
    }[scheduler.config.prediction_type]()
    return (x - alpha * x0) / sigma


SAMPLERS = {
    "leading": dict(steps_offset=1, set_alpha_to_one=False),
    "trailing": dict(timestep_spacing="trailing"),
    "v": dict(prediction_type="v_prediction"),
    "x0": dict(prediction_type="sample", timestep_spacing="linspace"),
}


def samplers(name, steps=5):
    """Our process, and diffusers' own scheduler."""
    plain = DDIMScheduler(**BETAS, **SAMPLERS[name], clip_sample=False)
    plain.set_timesteps(steps)
    return DDIMProcess.from_config(plain.config, num_inference_steps=steps), plain


@pytest.mark.parametrize("guidance", [None, "of the step", "learnt"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_ssd_of_a_dit_is_algorithm_1(name, guidance, batch):
    process, plain = samplers(name)
    arguments = {} if guidance is None else {"guidance_scales": (1.5, 3.0)}
    objective = ExplicitSelfDistillation(
        ForeignDiT(make_dit().double(), Kept(Path(), None)), process, fusion_weight=0.3,
        distil_guidance=guidance == "learnt", label_dropout=0.4, **arguments,
    )  # fmt: skip
    randomize(objective.teacher, seed=1)
    (x0, labels), draws, losses = batch, draw(objective), []

    def noise(model, x, timestep, label, scale=1.0):
        def once(label):
            labels = torch.tensor([label])
            return model(x[None], timestep=torch.tensor([timestep]), class_labels=labels).sample[0, :4]

        output = once(4) + scale * (once(label) - once(4))
        return noise_of(plain, output, x, timestep), output

    with torch.no_grad():
        for i, (s, (t,), eps, w) in enumerate(rows_of(draws)):
            assert s in plain.timesteps and t == s - 20 >= 0
            label = 4 if draws.label_dropped[i] else labels[i].item()
            x_s = plain.add_noise(x0[i : i + 1], eps[None], torch.tensor([s]))[0]
            step, learnt = w if guidance else 1.0, w if guidance == "learnt" else 1.0
            teacher, student = objective.teacher.model, objective.transformer.model
            x_t = plain.step(noise(teacher, x_s, s, label, step)[1], s, x_s).prev_sample
            target = 0.7 * noise(teacher, x_s, s, label, learnt)[0]
            target += 0.3 * noise(teacher, x_t, t, label, learnt)[0]
            losses.append((noise(student, x_s, s, label)[0] - target).square().mean())
    assert 0 < draws.label_dropped.sum() < 3
    actual = objective(x0, labels, draws)["loss"]
    torch.testing.assert_close(actual.double(), torch.stack(losses).mean(), rtol=2e-4, atol=0)


def test_stable_diffusion_learns_both_predictions_by_guided_steps(kept, batch):
    """A.2: with and without caption apart, the step guided by a scale of 5 to 15."""
    process, plain = samplers("leading")
    objective = ExplicitSelfDistillation(
        ForeignUNet(make_unet().double(), kept), process, fusion_weight=0.3, guidance_scales=(5.0, 15.0),
        apart=True,
    )  # fmt: skip
    randomize(objective.teacher, seed=1)
    teacher, student = objective.teacher.model, objective.transformer.model
    (x0, labels), draws, losses = batch, draw(objective), []

    def embedded(text):
        ids = kept.pipe.tokenizer([text], padding="max_length", max_length=20, return_tensors="pt").input_ids
        return kept.pipe.text_encoder(ids)[0].double()

    def noise(model, x, timestep, text):
        return model(x[None], timestep, encoder_hidden_states=embedded(text)).sample[0]

    with torch.no_grad():
        for i, (s, (t,), eps, w) in enumerate(rows_of(draws)):
            assert 5 <= w <= 15
            x_s = plain.add_noise(x0[i : i + 1], eps[None], torch.tensor([s]))[0]
            texts = CAPTIONS[labels[i]], ""
            caption, null = (noise(teacher, x_s, s, text) for text in texts)
            x_t = plain.step(null + w * (caption - null), s, x_s).prev_sample
            for text, at_s in zip(texts, (caption, null), strict=True):
                target = 0.7 * at_s + 0.3 * noise(teacher, x_t, t, text)
                losses.append((noise(student, x_s, s, text) - target).square().mean())
    actual = objective(x0, labels, draws)["loss"]
    torch.testing.assert_close(actual.double(), torch.stack(losses).mean(), rtol=2e-4, atol=0)


def test_progressive_distillation_of_a_dit_divides_ddims_steps(batch):
    process, plain = samplers("trailing")
    model = ForeignDiT(make_dit().double(), Kept(Path(), None))
    objective = ProgressiveDistillation(model, process, teacher_steps=2, label_dropout=0.0)
    randomize(objective.teacher, seed=1)
    (x0, labels), draws, losses = batch, draw(objective), []
    levels = torch.cat([plain.alphas_cumprod, torch.ones(1)])  # the last is that of the timestep -1

    def parts(network, x, timestep, label):
        """Data and noise."""
        noise = network.model(
            x[None], timestep=torch.tensor([timestep]), class_labels=labels[label : label + 1]
        ).sample[0, :4]
        return torch.stack([(x - (1 - levels[timestep]) ** 0.5 * noise) / levels[timestep] ** 0.5, noise])

    def moved(x, found, s, t):
        change = [levels[t] ** 0.5 - levels[s] ** 0.5, (1 - levels[t]) ** 0.5 - (1 - levels[s]) ** 0.5]
        return x + change[0] * found[0] + change[1] * found[1]

    with torch.no_grad():
        for i, (s, ends, eps, _) in enumerate(rows_of(draws)):
            assert ends == [s - 10, s - 20]
            x_s = x = plain.add_noise(x0[i : i + 1], eps[None], torch.tensor([s]))[0]
            for begin, end in ((s, s - 10), (s - 10, s - 20)):
                at = parts(objective.teacher, x, begin, i)
                there = moved(x, at, begin, end)
                if end >= 0:
                    there = moved(x, (at + parts(objective.teacher, there, end, i)) / 2, begin, end)
                x = there
            found = moved(x_s, parts(objective.transformer, x_s, s, i), s, s - 20)
            losses.append(((found - x) / 0.2).square().mean())
    actual = objective(x0, labels, draws)["loss"]
    torch.testing.assert_close(actual.double(), torch.stack(losses).mean(), rtol=2e-4, atol=0)


def test_issd_mixes_what_diffusers_blocks_add(batch):
    """With all of a block's work from s the blocks learn nothing; the loss begins at 0 without a mix."""
    for weight in (0.0, 1.0):
        network = ForeignDiT(make_dit().double(), Kept(Path(), None))
        objective = ImplicitSelfDistillation(network, samplers("trailing")[0], fusion_weight=weight)
        loss = objective(*batch, draw(objective))["loss"]
        loss.backward()
        inside = network.model.transformer_blocks[1].ff.net[2].weight.grad
        assert (loss < 1e-10) == (weight == 0)
        assert inside is None or not inside.any()
        assert weight == 0 or network.model.proj_out_2.weight.grad.any()


@pytest.mark.parametrize("function", [None, keep_products])
@pytest.mark.parametrize("case", ["dit, ssd", "dit, issd", "unet, ssd"])
def test_activation_checkpoints_change_nothing(case, function, kept, batch):
    kind = ImplicitSelfDistillation if "issd" in case else ExplicitSelfDistillation
    gradients = []
    for has_checkpoints in (False, True):
        network = ForeignUNet(make_unet(), kept) if "unet" in case else ForeignDiT(make_dit(), kept)
        if has_checkpoints:
            network.train().enable_gradient_checkpointing(function)
        objective = kind(network.double(), samplers("leading")[0], fusion_weight=0.3)
        randomize(objective.teacher, seed=1)
        objective(*batch, draw(objective))["loss"].backward()
        gradients.append([weight.grad for weight in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    assert first.any()


def test_their_blocks_are_compiled(kept):
    for network, count in ((ForeignDiT(make_dit(), kept), 2), (ForeignUNet(make_unet(), kept), 8 + 4)):
        objective = ExplicitSelfDistillation(network, samplers("leading")[0], fusion_weight=0.3)
        objective.compile_blocks()
        assert sum(module._compiled_call_impl is not None for module in network.modules()) == count


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_steps_are_diffusers(name):
    process, plain = samplers(name)
    generator = torch.Generator().manual_seed(0)
    sample, output = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).chunk(2)
    for timestep, (s, end) in zip(plain.timesteps, process.refined(1), strict=True):
        assert process.precondition_noise(s) == timestep
        expected = plain.step(output, timestep, sample)
        x0, noise = process.solve(output, sample, s)
        torch.testing.assert_close(x0, expected.pred_original_sample)
        found = process.moved(sample, x0, noise, s, end)
        torch.testing.assert_close(found, expected.prev_sample, rtol=1e-4, atol=1e-5)
    assert end == 0
    level = process.noise_levels[2].item()
    assert process.time_of(level * 0.999) == pytest.approx(process.times[2].item())
    ratios = torch.tensor([0.0, level * 0.999, level * 1.001, 1e6], dtype=torch.float64)
    expected = [process.time_of(ratio) for ratio in ratios.tolist()]
    assert process.time_of(ratios).tolist() == pytest.approx(expected)
    assert process.ratio_of(process.times[2]).item() == pytest.approx(level)


def test_images_are_those_of_the_pipeline():
    """With guidance, whose null class is 1000 in DiTPipeline."""
    model, vae = make_dit(num_classes=1000), make_vae()
    theirs = DiTPipeline(model, vae, DDIMScheduler(**BETAS, clip_sample=False))
    process = DDIMProcess.from_config(theirs.scheduler.config, num_inference_steps=5)
    ours = SDDiTPipeline(ForeignDiT(model, Kept(Path(), None)), process, vae=vae)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    for scale in (1.0, 4.0):
        expected = theirs(
            [3, 999], scale, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np"
        ).images
        found = ours([3, 999], scale, generator=torch.Generator().manual_seed(0), output_type="np").images
        assert expected.std() > 0.05
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_captions_are_embedded_as_the_pipeline_does(kept):
    network = ForeignUNet(make_unet(), kept)
    found = network.embedded(torch.tensor([2, 3, 0, 2]))
    for embedding, text in zip(found, ["rain", "", "a red cat", "rain"], strict=True):
        expected = kept.pipe.encode_prompt([text], "cpu", 1, False)[0][0]
        torch.testing.assert_close(embedding, expected)
    assert not found.requires_grad and (found[0] - found[1]).abs().max() > 0.1
    assert not [name for name, _ in network.named_parameters() if "text" in name]


OPTIONS = ["--max_train_steps", "4", "--num_inference_steps", "5", "--train_batch_size", "6",
           "--learning_rate", "1e-3", "--ema_decay", "0.5", "--num_validation_images", "4"]  # fmt: skip


def distil(parent, latents, folder, *options):
    arguments = ["--model", parent, "--dataset_name", latents, "--output_dir", folder, *OPTIONS, *options]
    distill_sddit.main([str(argument) for argument in arguments])
    return folder


def check_child(parent, child, network):
    """All but the network is the parent's, and the card's lines make an image without this package."""
    for path in parent.rglob("*"):
        place = path.relative_to(parent)
        if path.is_file() and place.parts[0] not in (network, "scheduler", "model_index.json"):
            assert (child / place).read_bytes() == path.read_bytes(), place
    theirs, ours = (
        load_file(folder / network / "diffusion_pytorch_model.safetensors") for folder in (parent, child)
    )
    assert theirs.keys() == ours.keys() and any((theirs[name] != ours[name]).any() for name in ours)
    before, after = (json.loads((folder / "model_index.json").read_text()) for folder in (parent, child))
    assert after == before | {"scheduler": ["diffusers", "DDIMScheduler"]}
    assert "num_inference_steps" not in (child / "scheduler/scheduler_config.json").read_text()
    card = (child / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "num_inference_steps=5" in code and "Apache" not in card
    assert f'from_pretrained("{child.name}")' in code and str(child.parent) not in card
    script = f"import sys\nsys.modules['sddit_diffusers'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", script], cwd=child.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stderr and Image.open(child.parent / "sample.png").size == (16, 16)
    return theirs, ours, code


@pytest.mark.thorough
@pytest.mark.process
def test_a_dit_is_distilled(dit_folder, dit_latents, tmp_path, capsys):
    child = distil(dit_folder, dit_latents, tmp_path / "child", "--checkpointing_steps", 2)
    theirs, ours, code = check_child(dit_folder, child, "transformer")
    printed = capsys.readouterr().out
    assert "from diffusers import DiTPipeline" in printed and "num_inference_steps=5" in printed
    assert "guidance_scale=1.0" in code
    variance = [place % 8 >= 4 for place in range(32)]  # of 2 x 2 pixels with 8 channels
    last = "proj_out_2.weight"
    assert torch.equal(theirs[last][variance], ours[last][variance])
    assert (theirs[last] != ours[last]).any()
    checkpoint = child / "checkpoint-4"
    assert not [name for name in checkpoint.rglob("*") if "vae" in name.name]


@pytest.mark.thorough
@pytest.mark.process
def test_stable_diffusion_is_distilled(sd_folder, sd_latents, tmp_path, capsys):
    assert LatentDataset(str(sd_latents)).id2label == dict(enumerate(sorted(CAPTIONS)))
    child = distil(sd_folder, sd_latents, tmp_path / "child")
    _, _, code = check_child(sd_folder, child, "unet")
    printed = capsys.readouterr().out
    assert "from diffusers import StableDiffusionPipeline" in printed and 'pipe("a ' in code
    assert (child / "text_encoder/model.safetensors").is_file()
    losses = [row["loss"] for row in read_metrics(child / "metrics.jsonl")]
    assert losses[0] > 0 and len(losses) == 4


@pytest.mark.parametrize(("share", "trained"), [(0.25, True), (0.75, False)])
def test_trained_is_what_knows_most_pictures(share, trained, dit_folder, dit_latents, tmp_path, monkeypatch):
    """A few whose noise is nearly all are far off where noise is predicted."""
    arguments = ["--model", dit_folder, "--dataset_name", dit_latents, "--output_dir", tmp_path, *OPTIONS]
    with training(parse([str(argument) for argument in arguments]), build_distillation) as trainer:
        process, seen = trainer.objective.scheduler, []
        noised = process.noised
        monkeypatch.setattr(process, "noised", lambda *inputs: seen.append(inputs) or noised(*inputs))

        def output(network, x, t, labels):
            is_wrong = torch.arange(len(x)) < share * len(x)
            return seen[0][1] + 1e3 * is_wrong[:, None, None, None]

        monkeypatch.setattr(trainer.objective, "output", output)
        assert (unexplained(trainer) < 1) == trained


@pytest.mark.parametrize("kind", ["dit", *thorough("sd")])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(kind, request, tmp_path):
    parent, latents = (request.getfixturevalue(f"{kind}_{part}") for part in ("folder", "latents"))
    whole = distil(parent, latents, tmp_path / "whole", "--num_validation_images", 0)
    half = distil(
        parent, latents, tmp_path / "half", "--num_validation_images", 0, "--checkpointing_steps", 2,
        "--max_train_steps", 2,
    )  # fmt: skip
    distil(parent, latents, half, "--num_validation_images", 0, "--resume_from_checkpoint", "latest")
    part = "transformer" if kind == "dit" else "unet"
    name = f"{part}/diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (half / name).read_bytes()
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(half / "metrics.jsonl")


def test_a_chain_goes_from_child_to_child(dit_folder, dit_latents, tmp_path):
    folder = distil(
        dit_folder, dit_latents, tmp_path / "chain", "--num_inference_steps", 10, 5, "--max_train_steps", 1,
        "--num_validation_images", 0,
    )  # fmt: skip
    for stage in ("steps-10", "steps-5"):
        assert (folder / stage / "model_index.json").is_file()
    last = json.loads((folder / "steps-5/training_config.json").read_text())
    assert last["model"] == "./steps-10" and "model" in last["names_only"]


def test_defaults_are_the_supplements(sd_folder, dit_folder):
    config = parse(["--model", str(sd_folder), "--dataset_name", "anything"])
    assert config.objective == "ssd" and config.apart and config.guidance_scale == [5.0, 15.0]
    assert (config.learning_rate, config.max_train_steps, config.train_batch_size) == (1e-6, 4000, 96)
    assert config.fusion_weight == [0.3] and config.vae == str(sd_folder)
    config = parse(["--model", str(dit_folder), "--dataset_name", "anything"])
    assert not config.apart and config.guidance_scale == [1.0] and config.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "heun"], "cannot take the steps: solver is 'heun'; DDIM's steps are 'euler'."),
        (["--num_inference_steps", "101"], "101 cannot be larger than"),
        (["--objective", "issd"], "take 'ssd'"),
        (["--dataset_name", "of classes"], "4 classes; "),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message, request, sd_folder, dit_folder, tmp_path, capsys):
    parent = sd_folder if "issd" in options else dit_folder
    latents = request.getfixturevalue("sd_latents" if parent == sd_folder else "dit_latents")
    if "of classes" in options:
        parent, options = tmp_path / "parent", []
        DiTPipeline(make_dit(num_classes=5), make_vae(), DDIMScheduler(**BETAS)).save_pretrained(parent)
    with pytest.raises(SystemExit) as error:
        distil(parent, latents, tmp_path / "child", *options)
    told = str(error.value) if error.value.code != 2 else capsys.readouterr().err
    assert message in told and told.strip().count("\n") == 0
    assert not (tmp_path / "child/model_index.json").exists()


def test_a_parent_that_is_not_known_is_named(dit_folder, tmp_path, capsys):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(4,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=2,
    )  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    flow = DiTPipeline.from_pretrained(dit_folder, vae=None, scheduler=FlowMatchEulerDiscreteScheduler())
    flow.save_pretrained(tmp_path / "flow")
    score = DiTPipeline.from_pretrained(dit_folder, vae=None)
    score.scheduler.register_to_config(prediction_type="score")
    score.save_pretrained(tmp_path / "score")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    for name, message in (
        ("ddpm", "is a DDPMPipeline; those that can be distilled are DiTPipeline, StableDiffusionPipeline"),
        ("flow", "is FlowMatchEulerDiscreteScheduler; it has no betas"),
        ("score", "prediction_type is 'score'; it must be one of epsilon, v_prediction, sample"),
        ("broken", "cannot be loaded"),
    ):
        with pytest.raises(SystemExit):
            parse(["--model", str(tmp_path / name), "--dataset_name", "anything"])
        assert message in capsys.readouterr().err.split("\n")[-2]


def test_without_captions_there_is_nothing_to_learn(sd_folder, dit_latents, tmp_path):
    manifest = json.loads((dit_latents / "manifest.json").read_text())
    bare = tmp_path / "latents"
    bare.mkdir()
    (bare / "data").symlink_to(dit_latents / "data")
    (bare / "manifest.json").write_text(json.dumps(manifest | {"class_names": None}))
    with pytest.raises(SystemExit, match="has no captions; prepare_latents takes them"):
        distil(sd_folder, bare, tmp_path / "child")
