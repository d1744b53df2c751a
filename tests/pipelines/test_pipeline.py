import json

import numpy as np
import pytest
import torch
from conftest import NETWORKS, TINY, make_latent_pipe, randomize
from diffusers import (
    AutoencoderTiny,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)

from sddit_diffusers import (
    EDMHeunScheduler,
    SDDiTPipeline,
    SDDiTTransformer2DModel,
)
from sddit_diffusers.pipelines.loading import load_vae
from sddit_diffusers.training.methods import METHODS


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(pipe, labels, seed=0, **arguments):
    arguments = {"num_inference_steps": 4, "output_type": "pt", **arguments}
    return pipe(labels, generator=torch.Generator().manual_seed(seed), **arguments).images


def test_saved_and_loaded_makes_the_same_image_to_the_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SDDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded, ["goldfish", 1]), generate(pipe, [2, "retriever"]))
    assert loaded.id2label == pipe.id2label and loaded.vae is None
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors", ".py"}
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "model_index.json").read_text())["id2label"] == {
        "0": "cat", "1": "golden retriever, retriever", "2": "goldfish", "3": "truck"
    }  # fmt: skip


def test_steps_are_the_schedulers_where_none_are_given(pipe):
    assert torch.equal(generate(pipe, 1, num_inference_steps=None), generate(pipe, 1, num_inference_steps=40))
    pipe.scheduler.register_to_config(num_inference_steps=3)
    assert torch.equal(generate(pipe, 1, num_inference_steps=None), generate(pipe, 1, num_inference_steps=3))
    assert torch.equal(generate(pipe, 1), generate(pipe, 1, num_inference_steps=4))


def test_equals_the_sampler_written_out(pipe, transformer):
    """Guidance, preconditioning and labels, in one plain loop over Euler steps and corrections."""
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))

    def denoise(x, sigma):
        def once(labels):
            f = transformer(
                x / (sigma**2 + 0.25) ** 0.5, torch.tensor(sigma).log() / 4, torch.tensor(labels)
            ).sample
            return 0.25 / (sigma**2 + 0.25) * x + 0.5 * sigma / (sigma**2 + 0.25) ** 0.5 * f

        conditional, null = once([3, 0]), once([4, 4])
        return null + 2.5 * (conditional - null) if 0.1 <= sigma <= 10 else conditional

    with torch.no_grad():
        x, levels = noise * 80, [80.0, 9.0, 0.5, 0.002]
        for sigma, after in zip(levels, levels[1:] + [0.0], strict=True):
            d = (x - denoise(x, sigma)) / sigma
            euler = x + (after - sigma) * d
            x = (
                euler
                if after == 0
                else x + (after - sigma) * (d + (euler - denoise(euler, after)) / after) / 2
            )
    actual = pipe(
        [3, 0],
        latents=noise,
        sigmas=levels,
        guidance_scale=2.5,
        guidance_interval=(0.1, 10.0),
        output_type="latent",
    ).images
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_the_conditional_output(pipe):
    once = generate(pipe, [1, 2])
    calls = []
    pipe.transformer.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    assert torch.equal(generate(pipe, [1, 2], guidance_scale=1.0), once)
    assert calls == [2] * 7  # no pass for the null class
    calls.clear()
    generate(pipe, [1, 2], guidance_scale=3.0)
    assert calls == [4] * 7  # one batched call for both halves
    assert torch.equal(generate(pipe, [1, 2], guidance_scale=3.0, guidance_interval=(100.0, 200.0)), once)


def test_null_class_is_the_models_own(pipe):
    assert torch.equal(generate(pipe, [1], guidance_scale=0.0), generate(pipe, [None], guidance_scale=0.0))
    torch.testing.assert_close(generate(pipe, [1], guidance_scale=0.0), generate(pipe, None))


@pytest.mark.parametrize(
    "labels", [2, [2], torch.tensor([2]), torch.tensor(2), np.array([2]), "goldfish", [" Goldfish"]]
)
def test_kinds_of_labels(pipe, labels):
    assert pipe.get_label_ids(labels) == [2]


def test_synonyms_and_whole_names_are_names(pipe):
    assert pipe.get_label_ids(["golden retriever", "retriever", pipe.id2label[1], "truck", None]) == [
        1,
        1,
        1,
        3,
        4,
    ]


def test_a_name_of_two_classes_is_refused_with_both(transformer):
    pipe = SDDiTPipeline(transformer, EDMHeunScheduler(), id2label={0: "crane, bird", 1: "Crane", 2: "dog"})
    assert pipe.get_label_ids(["crane, bird", "bird", "dog"]) == [0, 0, 2]
    with pytest.raises(
        ValueError, match=r"'crane' stands for several classes.* 0 \(crane, bird\), 1 \(Crane\)"
    ):
        pipe.get_label_ids("crane")


def test_every_image_depends_on_its_own_generator_alone(pipe):
    together = pipe([0, 1, 2], generator=generators(7, 8, 9), num_inference_steps=4, output_type="pt").images
    alone = pipe([1], generator=generators(8), num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(together[1:2], alone)


def test_images_per_label(pipe):
    images = pipe(
        [0, 3], num_images_per_label=2, generator=generators(1, 2, 1, 2), num_inference_steps=3
    ).images
    assert len(images) == 4
    singles = pipe([0, 0, 3, 3], generator=generators(1, 2, 1, 2), num_inference_steps=3).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in singles]


def test_output_types(pipe):
    pt, np_, latent = (generate(pipe, [1], output_type=kind) for kind in ("pt", "np", "latent"))
    pil = generate(pipe, [1], output_type="pil")[0]
    assert pt.shape == (1, 3, 8, 8) and np_.shape == (1, 8, 8, 3) and pil.size == (8, 8)
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(np_[0], pt[0].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(np.asarray(pil) / 255, np_[0], atol=0.5 / 255 + 1e-6)
    assert isinstance(pipe([1], num_inference_steps=2, return_dict=False), tuple)


def test_latents_replace_the_noise(pipe):
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(pipe, [1], latents=noise), generate(pipe, [1], seed=0))


def test_other_sizes(pipe):
    assert generate(pipe, [1], height=4, width=12).shape == (1, 3, 4, 12)


def test_latents_are_decoded(latent_pipe):
    latent = generate(latent_pipe, [1], output_type="latent")
    image = generate(latent_pipe, [1])
    config = latent_pipe.vae.config
    with torch.no_grad():
        expected = latent_pipe.vae.decode(
            latent / config.scaling_factor + (config.get("shift_factor") or 0)
        ).sample
    assert image.shape == (1, 3, 16, 16)
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="18 x 16; both must be multiples of 4"):
        generate(latent_pipe, [1], height=18)


def test_a_damaged_vae_is_told_of_where_it_is(latent_pipe, tmp_path):
    """And not that the folder around it is none."""
    latent_pipe.save_pretrained(tmp_path)
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 20)
    for name in (tmp_path, tmp_path / "vae"):
        with pytest.raises(ValueError, match="cannot be loaded: .*vae/diffusion_pytorch_model.safetensors"):
            load_vae(str(name))


def test_encoding_scales_what_the_vae_makes(latent_pipe, pipe):
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples, vae = latent_pipe.encode(images), latent_pipe.vae
    with torch.no_grad():
        encoded = vae.encode(images)
    own = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mean
    shift, factor = {"AutoencoderKL": (0.5, 0.3), "AutoencoderTiny": (0.0, 0.5)}[type(vae).__name__]
    assert samples.shape == (2, 3, 8, 6)
    torch.testing.assert_close(samples, factor * (own - shift))
    torch.testing.assert_close(latent_pipe.unscale_latents(samples), own)
    torch.testing.assert_close(
        latent_pipe.decode(own, "pt", scaled=False), latent_pipe.decode(samples, "pt"), rtol=1e-4, atol=1e-5
    )
    assert pipe.encode(images) is images and pipe.unscale_latents(images) is images
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 11\); it must be \(images, 3, a multiple of 2"):
        latent_pipe.encode(images[..., 1:])
    with pytest.raises(ValueError, match=r"have shape \(2, 1, 16, 12\)"):
        pipe.encode(images[:, :1])


def test_latent_pipeline_is_saved_whole(latent_pipe, tmp_path):
    latent_pipe.save_pretrained(tmp_path)
    loaded = SDDiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is type(latent_pipe.vae)
    assert torch.equal(
        generate(loaded, [1], output_type="latent"), generate(latent_pipe, [1], output_type="latent")
    )
    torch.testing.assert_close(generate(loaded, [1]), generate(latent_pipe, [1]))


def test_callback_sees_every_evaluation_and_may_change_it(pipe):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((i, float(t), tensors["latents"].clone()))
        return {"latents": tensors["latents"] * 0} if i == 6 else {}

    assert generate(pipe, [1], callback_on_step_end=callback, output_type="latent").abs().max() == 0
    assert [i for i, _, _ in seen] == list(range(7)) and pipe.num_timesteps == 7
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()


def test_interrupt_stops_after_the_evaluation(pipe):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append(i)
        pipe._interrupt = i == 2
        return tensors

    generate(pipe, [1], callback_on_step_end=callback)
    assert seen == [0, 1, 2]
    assert torch.equal(generate(pipe, [1]), generate(pipe, [1]))  # the next call starts afresh


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_diffusers_schedulers_swap_in_and_out(pipe, scheduler):
    # A network that shrinks towards zero is solved alike by all of them.
    for parameter in pipe.transformer.parameters():
        parameter.data.mul_(0.3)
    fine = generate(pipe, [1], num_inference_steps=100, output_type="latent")
    heun = pipe.scheduler
    pipe.scheduler = scheduler.from_config(heun.config)
    swapped = generate(pipe, [1], num_inference_steps=100, output_type="latent")
    assert ((swapped - fine).norm() / fine.norm()) < 0.05
    pipe.scheduler = EDMHeunScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(generate(pipe, [1], num_inference_steps=100, output_type="latent"), fine)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_only_the_heun_scheduler_takes_sigmas(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"{scheduler.__name__} takes no sigmas"):
        generate(pipe, [1], sigmas=[10.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_half_precision(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path)
    loaded = SDDiTPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.dtype == dtype
    for size in (8, 12):
        expected = generate(pipe, [1], output_type="latent", height=size)
        actual = generate(loaded, [1], output_type="latent", height=size)
        assert actual.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99
    loaded.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    assert generate(loaded, [1]).isfinite().all()


def test_bfloat16_transformer_keeps_the_latents_wide(pipe):
    expected = generate(pipe, [1], output_type="latent")
    pipe.to(torch.bfloat16)
    actual = generate(pipe, [1], output_type="latent")
    assert actual.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    "config",
    [
        lambda pipe: FirstBlockCacheConfig(threshold=0.0),
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1000, 1000),
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
    ],
)
def test_caches_with_a_guidance_interval(pipe, config):
    """The batch changes its size within a run, and a cached state must not cross over."""
    arguments = dict(guidance_scale=2.0, guidance_interval=(0.1, 10.0), num_inference_steps=8)
    expected = generate(pipe, [1, 2, 0], **arguments)
    pipe.transformer.enable_cache(config(pipe))
    cached = generate(pipe, [1, 2, 0], **arguments)
    assert cached.shape == expected.shape
    if pipe.transformer._cache_config.__class__ is FirstBlockCacheConfig:
        torch.testing.assert_close(cached, expected)
    assert torch.equal(cached, generate(pipe, [1, 2, 0], **arguments))
    assert pipe.current_timestep is None


def test_model_without_classes():
    pipe = SDDiTPipeline(randomize(SDDiTTransformer2DModel(**TINY | {"num_classes": 0})), EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert generate(pipe, None, num_images_per_label=2).shape == (2, 3, 8, 8)
    with pytest.raises(
        ValueError, match="label 0 is out of range; allowed are none: the model has no classes"
    ):
        pipe([0])


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([4], {}, "Class label 4 is out of range; allowed are integers from 0 to 3"),
        ([-1], {}, "Class label -1 is out of range"),
        ([1.5], {}, "Class label 1.5 is out of range"),
        (
            ["golden retreiver"],
            {},
            "Unknown class name 'golden retreiver'; 5 names are known: .*golden retriever",
        ),
        ([], {}, "class_labels is empty"),
        ([1], {"num_images_per_label": 0}, "num_images_per_label is 0"),
        ([[1]], {}, r"Class label \[1\] is out of range"),
        ([float("nan")], {}, "Class label nan is out of range"),
        ([1], {"height": 7}, "7 x 8; both must be multiples of 2"),
        (
            [1],
            {"latents": torch.zeros(2, 3, 8, 8)},
            r"\(2, 3, 8, 8\); this call needs .* \(1, 3, 8, 8\)",
        ),
        ([1], {"generator": generators(1, 2)}, "2 generators were given for 1 images"),
        ([1], {"guidance_interval": (5.0, 1.0)}, r"guidance_interval is \(5.0, 1.0\)"),
        ([1], {"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ([1], {"num_inference_steps": 0}, "num_inference_steps is 0"),
        (
            [1],
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            r"inputs is \['noise'\]",
        ),
    ],
)
def test_bad_input_is_named(pipe, labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(labels, **arguments)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("eight", r"^Unknown class name 'eight'; 3 names are known: seven, tench, fish\.$"),
        ("seven, tench", r"seven, tench, fish\. Several classes are several labels: a list in Python"),
        ("seven;9", "Several classes"),
        ("7 2", "Several classes"),
        ("great white, shark", r"seven, tench, fish\.$"),
    ],
)
def test_few_names_are_listed_and_separators_explained(transformer, label, message):
    pipe = SDDiTPipeline(transformer, EDMHeunScheduler(), id2label={0: "Seven", 1: "tench, fish"})
    with pytest.raises(ValueError, match=message):
        pipe([label])


def test_of_more_than_20_names_the_nearest_are_told(transformer):
    for count in (20, 21):
        pipe = SDDiTPipeline(transformer, EDMHeunScheduler(), id2label={i: f"n{i:02}x" for i in range(count)})
        with pytest.raises(ValueError, match=f"{count} names are known") as found:
            pipe(["n07"])
        assert ("n00x" in str(found.value)) == (count == 20)
        assert ("Nearest names: n07x" in str(found.value)) == (count == 21)


def test_names_need_names(transformer):
    with pytest.raises(ValueError, match="Unknown class name 'cat'; 0 names are known"):
        SDDiTPipeline(transformer, EDMHeunScheduler())(["cat"])


def test_samples_that_are_not_finite_are_named_with_their_seeds(pipe, inputs):
    with torch.no_grad():
        pipe.transformer.label_embed.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"Of 3 images image 1 \(seed 17\) is not finite"):
        pipe([0, 3, 1], num_inference_steps=2, generator=generators(5, 17, 6))
    for output_type in ("pil", "latent"):
        with pytest.raises(FloatingPointError, match="Of 2 images image 0, image 1 are not finite"):
            pipe([3, 3], num_inference_steps=2, output_type=output_type)
    with pytest.raises(FloatingPointError, match=r"image 3 \(seed 9\) and 2 more are not finite"):
        pipe([3] * 6, num_inference_steps=1, generator=torch.Generator().manual_seed(9))
    assert np.isfinite(generate(pipe, [0, 1]).numpy()).all()


def test_a_vae_that_overflows_is_told(latent_pipe):
    with torch.no_grad():
        for parameter in latent_pipe.vae.decoder.parameters():
            parameter.mul_(1e30)
    with pytest.raises(FloatingPointError, match=r"image 0 \(seed 3\), image 1 \(seed 4\) are .*VAE"):
        latent_pipe([0, 1], num_inference_steps=2, generator=generators(3, 4))
    with pytest.raises(FloatingPointError, match="Of 2 images image 0, image 1 are not finite once decoded"):
        latent_pipe.decode(torch.randn(2, 3, 8, 8))
    with pytest.raises(FloatingPointError, match="Of 1 images image 0 is not finite[.]"):
        latent_pipe.decode(torch.full((1, 3, 8, 8), torch.inf), "latent")


@pytest.mark.parametrize("churn", [(8.0, 0.0, float("inf"), 1.0), (2.0, 0.05, 30.0, 1.007)])
def test_churn_is_algorithm_2_and_an_images_own(pipe, churn):
    """Written out in float64; image i has its own noise, in the order in which it is drawn."""
    s_churn, s_tmin, s_tmax, s_noise = churn
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn = generators(7, 8)
    pipe.transformer.double()

    def denoise(x, sigma):
        f = pipe.transformer(x / (sigma**2 + 0.25) ** 0.5, np.log(sigma) / 4, torch.tensor([3, 0])).sample
        return 0.25 / (sigma**2 + 0.25) * x + 0.5 * sigma / (sigma**2 + 0.25) ** 0.5 * f

    levels = [(80 ** (1 / 7) + i / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(6)] + [0.0]
    with torch.no_grad():
        x = noise * 80
        for i, (sigma, after) in enumerate(zip(levels, levels[1:], strict=False)):
            gamma = min(s_churn / 6, 2**0.5 - 1) if i and s_tmin <= sigma <= s_tmax else 0
            raised = sigma + gamma * sigma
            if gamma:
                eps = torch.cat([torch.randn(1, 3, 8, 8, generator=g, dtype=torch.float64) for g in drawn])
                x = x + (raised**2 - sigma**2) ** 0.5 * s_noise * eps
            d = (x - denoise(x, raised)) / raised
            euler = x + (after - raised) * d
            if after == 0:
                x = euler
            else:
                x = x + (after - raised) * (d + (euler - denoise(euler, after)) / after) / 2
    names = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), churn, strict=True))
    options = names | {"num_inference_steps": 6, "output_type": "latent"}
    made = pipe([3, 0], latents=noise, generator=generators(7, 8), **options).images
    torch.testing.assert_close(made, x, rtol=1e-6, atol=1e-6)
    alone = pipe([0], latents=noise[1:], generator=generators(8), **options).images
    torch.testing.assert_close(alone, made[1:], rtol=1e-9, atol=1e-9)


def test_churn_reaches_the_schedulers_that_have_it_only(pipe):
    plain = generate(pipe, [1])
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    assert not torch.equal(generate(pipe, [1], s_churn=1.0), generate(pipe, [1]))
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert generate(pipe, [1], s_churn=0, s_noise=1).shape == plain.shape
    for churn in ({"s_churn": 1.0}, {"s_noise": 1.1}, {"s_tmin": 0.1}, {"s_tmax": 9.0}):
        with pytest.raises(ValueError, match="EDMDPMSolverMultistepScheduler has no churn"):
            generate(pipe, [1], **churn)


@pytest.mark.parametrize("kind", [None, "kl", "tiny"])
@pytest.mark.parametrize("network", METHODS)
def test_made_from_another_pipeline(kind, network):
    transformer = METHODS[network].transformer(**NETWORKS[network])
    vae = kind and make_latent_pipe(kind).vae
    pipe = SDDiTPipeline(randomize(transformer), EDMHeunScheduler(), vae, {3: "truck"})
    again = SDDiTPipeline.from_pipe(pipe)
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
    assert again.transformer is pipe.transformer and again.vae is pipe.vae
    options = {"num_inference_steps": 2}
    assert torch.equal(generate(again, ["truck", 1], **options), generate(pipe, ["truck", 1], **options))
    other = randomize(SDDiTTransformer2DModel(**TINY), 1)
    assert SDDiTPipeline.from_pipe(pipe, transformer=other).transformer is other
