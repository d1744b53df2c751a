import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize

from sddit_diffusers.training import prototypes
from sddit_diffusers.training.discrimination import teacher_momentum, teacher_temperature
from sddit_diffusers.training.prototypes import Center, ProjectionHead, cross_entropy
from sddit_diffusers.training.teacher import Teacher


def naive_cross_entropy(teacher, student, center, tau_t, tau_s):
    """Eqs. 10 and 11 for one token, prototype by prototype."""
    t = [math.exp((a - c) / tau_t) for a, c in zip(teacher, center, strict=True)]
    s = [math.exp(a / tau_s) for a in student]
    p_t, p_s = [x / sum(t) for x in t], [x / sum(s) for x in s]
    loss = -sum(a * math.log(b) for a, b in zip(p_t, p_s, strict=True))
    return loss, -sum(a * math.log(a) for a in p_t)


@pytest.mark.parametrize(
    ("shape", "tau_t", "tau_s"),
    itertools.product([(1, 1, 2), (3, 1, 7), (2, 5, 16), (1, 4, 33)], [0.04, 0.09, 0.5], [0.1, 1.0]),
)
def test_cross_entropy_equals_a_loop(shape, tau_t, tau_s, chunk):
    """By features that are the logits, for prototypes that are the axes."""
    identity = torch.eye(shape[-1])
    generator = torch.Generator().manual_seed(math.prod(shape))
    teacher, student = (torch.randn(shape, generator=generator).tanh() for _ in range(2))
    center = 0.3 * torch.randn(shape[-1], generator=generator)
    naive = [
        naive_cross_entropy(teacher[i, j].tolist(), student[i, j].tolist(), center.tolist(), tau_t, tau_s)
        for i in range(shape[0])
        for j in range(shape[1])
    ]
    loss, mean_logits, entropy, used = cross_entropy(
        (teacher, identity), (student, identity), center, tau_t, tau_s
    )
    chosen = (teacher - center).argmax(-1).flatten().tolist()
    assert [i for i in range(shape[-1]) if used[i]] == sorted(set(chosen))
    torch.testing.assert_close(mean_logits, teacher.mean((0, 1)))
    assert loss.item() == pytest.approx(sum(x for x, _ in naive) / len(naive), rel=1e-5)
    assert entropy.item() == pytest.approx(sum(x for _, x in naive) / len(naive), rel=1e-4, abs=1e-6)


def test_cross_entropy_moves_the_student_towards_the_teacher_only(chunk):
    """Its gradients are those of whole logits by autograd; a factor of the loss scales them."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, 5, generator=generator), torch.randn(8, 5, generator=generator)]
    tensors += [torch.randn(2, 3, 5, generator=generator), torch.randn(8, 5, generator=generator)]
    teacher, student = [x.double().requires_grad_() for x in tensors[:2]], [x.double() for x in tensors[2:]]
    student = [x.requires_grad_() for x in student]
    center = torch.linspace(-1, 1, 8).double()
    (3 * cross_entropy(teacher, student, center, 0.4, 0.7).loss).backward()
    assert all(tensor.grad is None for tensor in teacher)

    t = ((teacher[0] @ teacher[1].T - center) / 0.4).softmax(-1).detach()
    whole = -(t * (student[0] @ student[1].T / 0.7).log_softmax(-1)).sum(-1).mean()
    expected = torch.autograd.grad(3 * whole, student)
    torch.testing.assert_close([tensor.grad for tensor in student], list(expected))
    # And by the formula: (p_student - p_teacher) / tau, a mean over 6 tokens.
    p = (student[0] @ student[1].T / 0.7).softmax(-1)
    torch.testing.assert_close(student[0].grad, (3 * (p - t) / 0.7 / 6 @ student[1]).detach())
    with torch.no_grad():
        assert cross_entropy(teacher, student, center, 0.4, 0.7).loss.item() == pytest.approx(whole.item())


def test_cross_entropy_is_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    tensors = [F.normalize(torch.randn(*shape, generator=generator), dim=-1) for shape in ((2, 9, 5), (8, 5))]
    plain = cross_entropy(tensors, tensors, torch.zeros(8), 0.04, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = cross_entropy(tensors, tensors, torch.zeros(8), 0.04, 0.1)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b) and b.dtype == torch.float32


def test_gradients_are_rounded_under_bfloat16_and_no_more_than_that(chunk):
    generator = torch.Generator().manual_seed(0)
    teacher = [F.normalize(torch.randn(*shape, generator=generator), dim=-1) for shape in ((2, 9, 5), (8, 5))]
    student = [F.normalize(torch.randn(*shape, generator=generator), dim=-1) for shape in ((2, 9, 5), (8, 5))]
    gradients = []
    for bfloat16 in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in student]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = cross_entropy(teacher, leaves, torch.zeros(8), 0.07, 0.1).loss
        gradients.append(torch.autograd.grad(loss, leaves))
    for plain, rounded in zip(*gradients, strict=True):
        assert 0 < (plain - rounded).norm() < 0.01 * plain.norm()


@pytest.fixture(params=[10**9, 20])
def chunk(request, monkeypatch):
    """All tokens at once, or two or three."""
    monkeypatch.setattr(prototypes, "_CHUNK", {"cpu": request.param})


def test_head_gives_cosines_to_prototypes():
    head = randomize(ProjectionHead(6, 11, hidden_dim=10, bottleneck_dim=4))
    tokens = torch.randn(2, 3, 6)
    actual = head(tokens)
    with torch.no_grad():
        for i, j, k in itertools.product(range(2), range(3), range(11)):
            x = tokens[i, j]
            for layer in (0, 2):
                x = head.mlp[layer].weight @ x + head.mlp[layer].bias
                x = torch.tensor([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
            x = head.mlp[4].weight @ x + head.mlp[4].bias
            w = head.prototypes[k]
            assert actual[i, j, k].item() == pytest.approx((x @ w / x.norm() / w.norm()).item(), abs=1e-5)


def test_cosines_are_exact_under_autocast():
    """Divided by 0.04, an error of 1e-3 in a cosine is one of 2.5 % in a probability."""
    head = randomize(ProjectionHead(6, 11, hidden_dim=10, bottleneck_dim=4))
    tokens = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        features = head.mlp(tokens).double()
        actual = head(tokens)
    prototypes = head.prototypes.double()
    cosines = features @ prototypes.T / features.norm(dim=-1, keepdim=True) / prototypes.norm(dim=-1)
    torch.testing.assert_close(actual.double(), cosines, rtol=0, atol=1e-6)


def test_a_center_without_a_batch_stays():
    center = Center(2)
    center.move(0.9)
    assert torch.equal(center.value, torch.zeros(2))


def test_centers_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    center, naive = Center(5), [0.0] * 5
    for step in range(4):
        batches = [torch.randn(3, 2, 5, generator=generator) for _ in range(step % 2 + 1)]
        for batch in batches:
            center.add(batch.mean((0, 1)))
        center.move(0.9)
        for k in range(5):
            values = [batch[i, j, k].item() for batch in batches for i in range(3) for j in range(2)]
            naive[k] = 0.9 * naive[k] + 0.1 * sum(values) / len(values)
    torch.testing.assert_close(center.value, torch.tensor(naive))


def test_center_is_reduced_over_processes():
    center = Center(2)
    center.add(torch.tensor([1.0, 3.0]))
    center.move(0.5, reduce=lambda mean: (mean + torch.tensor([3.0, 1.0])) / 2)  # the other process's mean
    torch.testing.assert_close(center.value, torch.tensor([1.0, 1.0]))


@pytest.fixture
def networks(transformer):
    head = randomize(ProjectionHead(16, 11, hidden_dim=10, bottleneck_dim=4), seed=1)
    return transformer, head, Teacher(transformer, head)


def student_of(transformer, head):
    return dict(transformer.named_parameters("encoder")) | dict(head.named_parameters("head"))


def test_teacher_begins_as_the_students_encoder(networks):
    transformer, head, teacher = networks
    student = student_of(transformer, head)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, student[name]) and not parameter.requires_grad
        assert parameter.data_ptr() != student[name].data_ptr()
    assert {name for name in student if name not in dict(teacher.named_parameters())} == {
        f"encoder.{name}" for name, _ in transformer.named_parameters() if name.startswith("decoder.")
    }
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    output = teacher.encoder(x, t, labels)
    assert output.sample is None
    assert torch.equal(output.encoder_hidden_states, transformer(x, t, labels).encoder_hidden_states)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 1.0])
def test_teacher_is_the_average_of_the_student(networks, momentum):
    transformer, head, teacher = networks
    expected = {name: parameter.clone().double() for name, parameter in teacher.named_parameters()}
    for step in range(3):
        randomize(transformer, seed=10 + step)
        randomize(head, seed=20 + step)
        teacher.update(transformer, head, momentum)
        student = student_of(transformer, head)
        expected = {
            n: momentum * e + (1 - momentum) * student[n].detach().double() for n, e in expected.items()
        }
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    if momentum == 1:
        assert all(torch.equal(p.double(), expected[n]) for n, p in teacher.named_parameters())


def test_momentum_follows_a_cosine():
    values = [teacher_momentum(step, 1000) for step in range(1001)]
    assert values[0] == pytest.approx(0.996) and values[-1] == pytest.approx(0.999)
    assert values[500] == pytest.approx(0.9975) and values[250] == pytest.approx(
        0.996 + 0.003 * (1 - 2**-0.5) / 2
    )
    assert values == sorted(values)


def test_temperature_warms_up_in_a_line():
    assert [round(teacher_temperature(step, 4), 6) for step in range(7)] == [
        0.09, 0.09225, 0.0945, 0.09675, 0.099, 0.099, 0.099
    ]  # fmt: skip
    assert teacher_temperature(0, 0) == 0.099
