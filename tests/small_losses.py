"""Small networks with auxiliary losses beside them, and what the tests of every such loss ask."""

import copy
import json

import torch
from conftest import NETWORKS, randomize
from small_runs import HEAD, NETWORK, SMALL

import train_sddit
from sddit_diffusers import EDMHeunScheduler, InterpolantScheduler
from sddit_diffusers.data.order import Batch
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.trainer import Trainer

SHARED = Batch(
    0.5 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4)),
    torch.tensor([0, 3, 1, 3]),
    None,
)
# A method, a process of each kind, and a mask where the method has one.
CASES = [("dit", "edm", 0.0), ("sddit", "edm", 0.5), ("maskdit", "linear", 0.5), ("mdt", "linear", 0.5)]


def process_of(name):
    return EDMHeunScheduler() if name == "edm" else InterpolantScheduler(path=name)


def make(*losses, method="dit", process="edm", mask_ratio=0.0, **arguments):
    """An objective with the losses beside it, made of the network and `arguments`."""
    network = randomize(METHODS[method].transformer(**NETWORKS[method]))
    made = {loss.name: randomize(loss(network, **arguments), seed=1) for loss in losses}
    process = process_of(process) if isinstance(process, str) else process
    return METHODS[method].objective(network, process, made, mask_ratio=mask_ratio, label_dropout=0.3)


def draw(objective, seed=0):
    return objective.draw(SHARED.x0.shape, torch.Generator().manual_seed(seed))


def losses_of(objective, draws=None):
    return objective(SHARED.x0, SHARED.labels, draws or draw(objective))


def visible_of(method, draws, i):
    """The patches of image i that a block sees, `[1, k]`; None: all. MDT's first view is whole."""
    return None if method == "mdt" or draws.visible_ids is None else draws.visible_ids[i : i + 1]


def inputs_of(process, draws, i, t=None):
    """What the network takes of image i, in float64, by the papers' formulas."""
    x0, noise = SHARED.x0[i : i + 1].double(), draws.noise[i : i + 1].double()
    t = draws.t[i].double().flatten() if t is None else torch.tensor([t], dtype=torch.float64)
    label = torch.tensor([4 if draws.label_dropped[i] else SHARED.labels[i]])
    if process == "edm":
        return (x0 + t * noise) / (t**2 + 0.25).sqrt(), t.log() / 4, label
    return (1 - t) * x0 + t * noise, 1000 * t, label


def tokens_after(network, layer, method, inputs, visible=None):
    """The patches' tokens after a block of a whole network, `[m, D]`, in float64."""
    network, kept = copy.deepcopy(network).double(), []
    block = network.transformer_blocks[layer - 1]
    block._forward_hooks.clear()  # of the objective
    block.register_forward_hook(lambda module, inputs, tokens: kept.append(tokens))
    with torch.no_grad():
        network(*inputs, *(() if visible is None else (visible,)))
    return kept[0][0, method == "sddit" :]


def reached(objective, name):
    """The parameters that a loss alone gives gradients other than 0; those of others are None or 0."""
    objective.zero_grad()
    losses_of(objective)[f"loss_{name}"].backward()
    return {
        name
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }


def up_to(objective, layer):
    """The parameters of the network up to a block."""
    parts = ["patch_embed", "time_embed", "label_embed", "cls_token"]
    parts += [f"transformer_blocks.{i}." for i in range(layer)]
    names = [name for name, _ in objective.named_parameters()]
    return {name for name in names if name.startswith(tuple(f"transformer.{part}" for part in parts))}


def same_base_draws(*objectives):
    """Whether times, noise, masks and dropped labels are the same."""
    first, *others = (draw(objective)[:5] for objective in objectives)
    return all(a is b is None or a.equal(b) for other in others for a, b in zip(first, other, strict=True))


def options(*auxiliaries, method="dit", **network):
    """Of a run on the command line."""
    network = METHODS[method].network(NETWORK | {"num_layers": 3} | network)
    small = SMALL if "discrimination" in auxiliaries else SMALL[len(HEAD) :]
    chosen = ["--method", method, "--auxiliary", *auxiliaries, "--transformer", json.dumps(network)]
    return [*small, *chosen]


def main(folder, *arguments):
    train_sddit.main([*map(str, [*arguments, "--output_dir", folder])])


def trainer_of(folder, *arguments):
    return Trainer(train_sddit.parse([*map(str, [*arguments, "--output_dir", folder])]))


def goes_on_to_the_bit(tmp_path, *arguments):
    """Whether a run that lost its last steps and goes on leaves what an uninterrupted one leaves."""
    saving = [*arguments, "--max_train_steps", 4, "--checkpointing_steps", 2]
    for folder in ("through", "stopped"):
        main(tmp_path / folder, *saving)
    for name in ("checkpoint-4", "metrics.jsonl", "transformer"):
        path = tmp_path / "stopped" / name
        path.rename(tmp_path / f"lost-{name}")
    log = (tmp_path / "lost-metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped/metrics.jsonl").write_text("".join(log[:2]))
    main(tmp_path / "stopped", *saving, "--resume_from_checkpoint", "latest")
    files = ("metrics.jsonl", "transformer/diffusion_pytorch_model.safetensors", "checkpoint-4/state.pt")
    pairs = [[(tmp_path / folder / name).read_bytes() for folder in ("through", "stopped")] for name in files]
    return all(a == b for a, b in pairs)
