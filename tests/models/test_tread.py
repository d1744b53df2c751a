"""TREAD's network: what is routed and what is not, beside a restatement token by token, and what it saves."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import NETWORKS, randomize, thorough
from torch.utils.flop_counter import FlopCounterMode

from sddit_diffusers import PRESETS, EDMHeunScheduler, PlainDiTTransformer2DModel, TREADTransformer2DModel
from sddit_diffusers.models.presets import read_changes
from sddit_diffusers.models.transformer_baselines import route_end_of
from sddit_diffusers.training.auxiliary import AuxiliaryLoss
from sddit_diffusers.training.building import set_checkpointing
from sddit_diffusers.training.methods import METHODS
from sddit_diffusers.training.objective import Objective

LONGER = NETWORKS["dit"] | {"num_layers": 5, "route_start": 1, "route_end": 3}
VISIBLE = torch.tensor([[5, 0, 11, 7, 2, 9], [14, 15, 1, 3, 8, 6]])


def make(**changes):
    return randomize(TREADTransformer2DModel(**LONGER | changes))


def plain(model):
    """DiT with the weights of a TREAD."""
    dit = PlainDiTTransformer2DModel(**NETWORKS["dit"] | {"num_layers": model.config.num_layers})
    dit.load_state_dict(model.state_dict())
    return dit


def test_not_routed_it_is_dit_to_the_bit(inputs):
    model = make()
    dit = plain(model)
    assert all(a.equal(b) for a, b in zip(model.parameters(), dit.parameters(), strict=True))
    for a, b in zip(model(*inputs).to_tuple(), dit(*inputs).to_tuple(), strict=True):
        assert a.equal(b)


def test_routed_all_through_in_any_order_it_is_dit(inputs):
    model = make()
    expected = plain(model)(*inputs).to_tuple()
    everything = torch.arange(16).expand(2, -1)
    for a, b in zip(model(*inputs, everything).to_tuple(), expected, strict=True):
        assert a.equal(b)
    shuffled = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    for a, b in zip(model(*inputs, shuffled).to_tuple(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def naive(model, x, t, labels, visible_ids):
    """The forward image by image and token by token: all of attention in sums over pairs of tokens."""
    p, heads = model.config.patch_size, model.config.num_attention_heads
    grid = x.shape[-1] // p
    images = []
    for i in range(len(x)):
        c = model._condition(t[i], labels[i : i + 1], x[i : i + 1])[0]
        tokens = {}
        for n in range(grid * grid):
            down, across = p * (n // grid), p * (n % grid)
            patch = x[i, :, down : down + p, across : across + p]
            embedded = model.patch_embed.weight.flatten(1) @ patch.flatten() + model.patch_embed.bias
            tokens[n] = embedded + model.pos_embed.table[n]
        for number, block in enumerate(model.transformer_blocks):  # from 0: those of 1 and 2 are routed
            goes = {n: z for n, z in tokens.items() if number not in (1, 2) or n in visible_ids[i].tolist()}
            tokens |= naive_block(block, goes, c, heads)
        image = torch.zeros_like(x[i])
        shift, scale = model.norm_out.linear(F.silu(c)).chunk(2)
        for n, z in tokens.items():
            made = model.proj_out.weight @ adapted(z, shift, scale) + model.proj_out.bias
            for place, pixel in enumerate(made.view(p * p, -1)):
                image[:, p * (n // grid) + place // p, p * (n % grid) + place % p] = pixel
        images.append(image)
    return torch.stack(images)


def adapted(z, shift, scale):
    normed = (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt()
    return normed * (1 + scale) + shift


def naive_block(block, tokens, c, heads):
    """A block of some tokens, by number."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(F.silu(c)).chunk(6)
    read = {n: adapted(z, shift1, scale1) for n, z in tokens.items()}
    q, k, v = (
        {n: layer(z).view(heads, -1) for n, z in read.items()}
        for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
    )
    made = {}
    for n, z in tokens.items():
        mixed = []
        for h in range(heads):
            scores = torch.stack([q[n][h] @ k[m][h] / math.sqrt(len(q[n][h])) for m in tokens]).exp()
            mixed.append(scores / scores.sum() @ torch.stack([v[m][h] for m in tokens]))
        z = z + gate1 * block.attn.to_out[0](torch.cat(mixed))
        made[n] = z + gate2 * block.ff(adapted(z, shift2, scale2))
    return made


def test_it_and_its_gradients_are_those_of_a_loop_over_images_and_tokens(inputs):
    model, (x, t, labels) = make(num_layers=4).double(), inputs
    x = x.double().requires_grad_()
    leaves = [x, *model.parameters()]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = naive(model, x, t, labels, VISIBLE)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    for checkpointing in (None, "full", "selective"):
        if checkpointing:
            set_checkpointing(model, checkpointing)
        actual = model(x, t, labels, VISIBLE).sample
        gradients = torch.autograd.grad((actual * weights).sum(), leaves)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        for a, b in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_those_that_skip_come_back_as_they_left_at_their_places(inputs):
    model, entered, left = make(), {}, {}
    for number, block in enumerate(model.transformer_blocks, 1):
        block.register_forward_hook(
            lambda block, args, output, number=number: (
                entered.update({number: args[0]}), left.update({number: output})
            ) and None
        )  # fmt: skip
    tokens = model(*inputs, VISIBLE).encoder_hidden_states
    assert [entered[number].shape[1] for number in range(1, 6)] == [16, 6, 6, 16, 16]
    assert [model.sees_part(number) for number in range(1, 6)] == [False, True, True, False, False]
    for i in range(2):
        places = VISIBLE[i].tolist()
        for n in range(16):
            if n in places:
                assert entered[2][i, places.index(n)].equal(left[1][i, n])
                assert entered[4][i, n].equal(left[3][i, places.index(n)])
            else:
                assert entered[4][i, n].equal(left[1][i, n])
    assert tokens.equal(left[5])


def test_a_fresh_network_leaves_all_tokens_in_their_order(inputs):
    """Every block is an identity at the start."""
    model = TREADTransformer2DModel(**LONGER)
    assert model(*inputs, VISIBLE).encoder_hidden_states.equal(model._embed(inputs[0])[0])


@pytest.mark.parametrize(
    ("start", "end", "same"),
    [(0, 0, True), (2, 2, True), (4, 4, True), (0, 1, False), (0, 4, False), (3, 4, False)],
)
def test_any_route_from_before_the_first_block_to_the_last_but_one(start, end, same, inputs):
    model = make(route_start=start, route_end=end)
    routed, whole = model(*inputs, VISIBLE).sample, model(*inputs).sample
    assert routed.equal(whole) == same
    assert sum(model.sees_part(number) for number in range(1, 6)) == end - start


@pytest.mark.parametrize(
    ("layers", "start", "end"),
    # The paper's: 12, 24 and 28 blocks; then ours for small networks.
    [
        (12, 2, 9),
        (24, 2, 21),
        (28, 2, 25),
        (8, 2, 5),
        (4, 2, 3),
        (3, 1, 2),
        (2, 1, 1),
        (1, 0, 0),
        (12, 9, 10),
    ],
)
def test_where_a_route_ends_by_itself(layers, start, end):
    assert route_end_of(layers, start) == end
    model = TREADTransformer2DModel(**NETWORKS["dit"] | {"num_layers": layers, "route_start": start})
    assert model.config.route_end == end


def test_a_saved_network_keeps_its_route(inputs, tmp_path):
    model = make(route_end=None, num_layers=6)
    assert model.config.route_end == 4
    model.save_pretrained(tmp_path)
    assert '"route_end": 4' in (tmp_path / "config.json").read_text()
    again = TREADTransformer2DModel.from_pretrained(tmp_path)
    assert again(*inputs, VISIBLE).sample.equal(model(*inputs, VISIBLE).sample)
    assert TREADTransformer2DModel.from_config(model.config).config.route_end == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route_start": 3, "route_end": 2}, "route_end is 2; it must be a whole number, at least 3"),
        ({"route_end": 5}, "route_end is 5; it must be a whole number, at least 1 and at most 4"),
        ({"route_end": 2.0}, "route_end is 2.0; it must be a whole number"),
        ({"route_end": True}, "route_end is True; it must be a whole number"),
        ({"route_end": "3"}, "route_end is '3'; it must be a whole number"),
        ({"route_start": -1}, "route_start is -1; it must be a whole number, at least 0 and at most 4"),
        ({"route_start": 5}, "route_start is 5; it must be a whole number, at least 0 and at most 4"),
        ({"route_start": 1.5}, "route_start is 1.5; it must be a whole number"),
        ({"route_start": None}, "route_start is None; it must be a whole number"),
    ],
)  # fmt: skip
def test_no_route_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        TREADTransformer2DModel(**LONGER | changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_route_is_a_setting_of_the_network():
    network = METHODS["tread"].network(PRESETS["SD-DiT-B/2"])
    assert read_changes('{"route_start": 0, "route_end": 6}', network) == {"route_start": 0, "route_end": 6}
    assert read_changes('{"route_end": null}', network) == {"route_end": None}
    for text, problem in (
        ('{"route_start": -1}', "route_start is -1; it must be in 0.."),
        ('{"route_start": null}', "route_start is None; it must be a whole number"),
        ('{"route_end": 2.5}', "route_end is 2.5; it must be a whole number"),
        ('{"route_end": 0}', "route_end is 0; it must be in 1.."),
    ):
        with pytest.raises(ValueError, match=f"transformer: {problem}"):
            read_changes(text, network)
    with pytest.raises(ValueError, match="transformer has no setting 'route_end'"):
        read_changes('{"route_end": 6}', METHODS["dit"].network(PRESETS["SD-DiT-B/2"]))


@pytest.mark.parametrize(
    ("preset", "width", "routed", "saved"),
    [("SD-DiT-S/2", 384, 7, 0.306), ("SD-DiT-B/2", 768, 7, 0.299), ("SD-DiT-XL/2", 1152, 23, 0.417)],
)
def test_half_of_the_tokens_cost_half_of_the_routed_blocks(preset, width, routed, saved):
    """And half of their attention again; the blocks' modulation is of an image, not of its tokens."""

    def of_block(n):  # q, k, v, out and the MLP of each token; the scores, and the sums that they weigh
        return n * 2 * (4 + 8) * width**2 + 2 * 2 * n * n * width

    counts = []
    with torch.device("meta"):
        model = TREADTransformer2DModel(**METHODS["tread"].network(PRESETS[preset]))
        x, t, labels = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        for visible_ids in (None, torch.zeros(1, 128, dtype=torch.long)):  # DiT, and half of 256
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(x, t, labels, visible_ids)
            counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == routed * (of_block(256) - of_block(128))
    assert 1 - counts[1] / counts[0] == pytest.approx(saved, abs=0.0005)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_auxiliary_losses_see(mode, inputs):
    """Of the routed blocks the routed tokens, of all others, the last among them, all tokens."""

    class Watch(AuxiliaryLoss):
        name, layers = "watch", (1, 2, 3, 4, 5)

        def forward(self, view, process, draws):
            self.view = view
            return {"loss_watch": view.tokens.mean()}

    watch = Watch(1.0)
    objective = Objective(make(), EDMHeunScheduler(), {"watch": watch}, mask_ratio=0.5)
    getattr(objective, mode)()
    draws = objective.draw(inputs[0].shape, torch.Generator().manual_seed(0))
    objective(inputs[0], inputs[2], draws)
    view = watch.view
    assert draws.visible_ids.shape == (2, 8) and view.visible_ids is None and view.tokens.shape == (2, 16, 16)
    assert view.layers[5].values.equal(view.tokens)
    for layer in (1, 4, 5):
        assert view.layers[layer].ids is None and view.layers[layer].values.shape == (2, 16, 16)
    for layer in (2, 3):
        assert view.layers[layer].ids.equal(draws.visible_ids)
        assert view.layers[layer].values.shape == (2, 8, 16)


def test_every_token_is_denoised(inputs):
    """The loss is the mean over all patches, those that skipped among them."""
    objective = Objective(make(), EDMHeunScheduler(), mask_ratio=0.5, label_dropout=0.0)
    x0, _, labels = inputs
    draws = objective.draw(x0.shape, torch.Generator().manual_seed(0))
    losses = []
    for i in range(2):
        sigma = draws.t[i].item()
        noised = x0[i] + sigma * draws.noise[i]
        scaled = (noised / math.sqrt(sigma**2 + 0.25)).unsqueeze(0)
        time = torch.tensor(math.log(sigma) / 4)
        f = objective.transformer(scaled, time, labels[i : i + 1], draws.visible_ids[i : i + 1]).sample[0]
        denoised = 0.25 / (sigma**2 + 0.25) * noised + 0.5 * sigma / math.sqrt(sigma**2 + 0.25) * f
        for row in range(8):
            for column in range(8):
                error = (denoised - x0[i])[:, row, column].square().mean()
                losses.append((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error)
    torch.testing.assert_close(
        objective(x0, labels, draws)["loss"], torch.stack(losses).mean(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("schedule", ["constant", *thorough("cosine")])
def test_compiled_blocks_take_both_lengths(schedule, inputs, graphs):
    x0, _, labels = inputs
    objective = Objective(make(), EDMHeunScheduler(), mask_ratio=0.5, mask_ratio_schedule=schedule)
    draws = objective.draw(x0.shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = objective(x0, labels, draws)["loss"]
        objective.compile_blocks()
        actual = objective(x0, labels, draws)["loss"]
        torch.testing.assert_close(actual, expected)
        assert 2 <= (count_before := len(graphs)) <= 3  # as they are embedded, routed, and come back
        objective(x0, labels, draws)
        assert len(graphs) == count_before
