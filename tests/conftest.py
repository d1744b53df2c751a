"""Small real components that the tests share."""

import os
import subprocess
import sys
from functools import partial

import processes
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny
from matplotlib.figure import Figure
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel, prepare_latents
from sddit_diffusers.evaluation.classifiers import train_classifier
from sddit_diffusers.models.transformer_sddit import SDDiTBlock
from sddit_diffusers.training import encoders, metrics

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count())}
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # A core for each worker: threads of several would wait for one another.
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(CORES)[worker % len(CORES)]})
    torch.set_num_threads(1)

TINY = dict(
    sample_size=8,
    patch_size=2,
    in_channels=3,
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    num_decoder_layers=2,
    decoder_num_attention_heads=2,
    decoder_attention_head_dim=6,
    num_classes=4,
)
_ENCODER = {name: value for name, value in TINY.items() if "decoder" not in name}
NETWORKS = {
    "sddit": TINY,
    "dit": _ENCODER,
    "maskdit": TINY,
    "mdt": _ENCODER | {"num_decoder_layers": 2},
    "tread": _ENCODER | {"route_start": 1, "route_end": 2},
}


def thorough(*cases):
    """Values of a parameter, or tuples of several, that `pytest -m thorough` alone runs."""
    return [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.thorough) for x in cases]


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights without the zeros of the initialisation, behind which a mistake would hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Features and classifiers are cached where no other run finds them."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    few_steps = partial(train_classifier, steps=10)
    monkeypatch.setattr(encoders, "train_classifier", few_steps)  # REPA's; any weights do here
    return folder


@pytest.fixture(autouse=True)
def no_process(request, monkeypatch):
    """A test that starts a Python says so: `pytest -m "not process and not slow"` is quick."""
    start = subprocess.Popen.__init__

    def refuse(*_):
        pytest.fail("this test starts a process: mark it with @pytest.mark.process")

    def watch(self, command, *rest, **options):
        start(self, command, *rest, **options) if command[0] != sys.executable else refuse()

    if not request.node.get_closest_marker("process"):
        monkeypatch.setattr(subprocess.Popen, "__init__", watch)
        monkeypatch.setattr(processes, "ask", refuse)


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """To draw the curves of a run takes a second: figures are saved without what is on them.

    Tests that look at them are marked `figures`.
    """
    savefig = Figure.savefig
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **options: savefig(Figure(), *a, **options))
        monkeypatch.setattr(metrics, "_draw_curves", lambda rows, file: savefig(Figure(), file, format="png"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Inception v3 with fixed random weights, as a file."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        inception = FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for name, weight in inception.named_parameters():
        if name.endswith("conv.weight"):
            fan_in = weight[0].numel()
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
    inception.fc.weight.copy_(torch.randn(inception.fc.weight.shape, generator=generator) * 0.5)
    torch.save(inception.state_dict(), path)
    return path


@pytest.fixture
def transformer():
    return randomize(SDDiTTransformer2DModel(**TINY))


@pytest.fixture
def inputs():
    """Two samples for a network of TINY, timesteps and labels."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 3, 8, 8, generator=generator),
        torch.tensor([-1.2, 0.3]),
        torch.tensor([3, 4]),  # a class and the null class
    )


@pytest.fixture
def pipe(transformer):
    pipe = SDDiTPipeline(
        transformer,
        EDMHeunScheduler(),
        id2label={0: "cat", 1: "golden retriever, retriever", 2: "goldfish", 3: "truck"},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_latent_pipe(kind):
    """A pipeline with a small VAE, AutoencoderKL ("kl") or AutoencoderTiny ("tiny"), of 16 x 16 pixels."""
    channels = (8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = {
            "kl": lambda: AutoencoderKL(
                block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=3,
                scaling_factor=0.3, shift_factor=0.5,
            ),
            "tiny": lambda: AutoencoderTiny(
                encoder_block_out_channels=channels, decoder_block_out_channels=channels,
                num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=3, scaling_factor=0.5,
            ),
        }[kind]()  # fmt: skip
    pipe = SDDiTPipeline(randomize(SDDiTTransformer2DModel(**TINY)), EDMHeunScheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["kl", "tiny"])
def latent_pipe(request):
    return make_latent_pipe(request.param)


@pytest.fixture
def graphs(monkeypatch):
    """What reaches the backend of blocks that are compiled, a graph for each compilation."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(block, **options):
        torch.nn.Module.compile(block, backend=count, fullgraph=True, **options)

    monkeypatch.setattr(SDDiTBlock, "compile", compile)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory):
    """A folder of a DINOv2 of random weights, whose patches are of 3 x 3 pixels."""
    folder = tmp_path_factory.mktemp("vision-model")
    config = Dinov2Config(
        image_size=12, patch_size=3, hidden_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.3]).save_pretrained(folder)
    return str(folder)


def write_latents(folder, rows, shard_size, *more):
    """Latents of a source of ten classes, sorted by class, as the program writes them.

    The moments are made up: the means of row 4321 are 4 in the first channel and 321 in the second.
    """
    source = folder.parent / f"{folder.name}-source"
    for i in range(10):
        (source / str(i)).mkdir(parents=True)
        for row in range(rows * i // 10, rows * (i + 1) // 10):
            Image.new("RGB", (4, 4), (row // 256, row % 256, 0)).save(source / str(i) / f"{row:06d}.png")

    class Numbers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.device, self.dtype = {"scaling_factor": 0.5}, "cpu", torch.float32

        def encode(self, pixels):
            high, low, _ = ((pixels[:, :, :1, :1] + 1) * 127.5).round().unbind(1)
            numbers = (256 * high + low).unsqueeze(1)
            # fp16 holds integers up to 2048.
            mean = torch.cat([numbers // 1000, numbers % 1000], dim=1).float().expand(-1, -1, 2, 2)
            posterior = type("", (), {"mean": mean, "std": torch.full_like(mean, 0.25)})
            return type("", (), {"latent_dist": posterior})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_latents, "load_vae", lambda name: Numbers())
        options = ["--dataset_name", source, "--vae", "numbers", "--output_dir", folder, "--resolution", 4]
        prepare_latents.main([str(option) for option in [*options, "--shard_size", shard_size, *more]])
    AcceleratorState._reset_state(True)


class Touch:
    """What a pickle of it would do, if it were run: make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def global_batch(parts, step, accumulation):
    """The rows of a step's global batch, from the micro-batches of each process."""
    micro_batches = range(step * accumulation, (step + 1) * accumulation)
    return [row for micro in micro_batches for part in parts for row in part[micro]]
