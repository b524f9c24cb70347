"""Every divergence against its definition in float64, and what it says of itself."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
from problems import DEFINITIONS, kd_and_grad, loss_of_logits, make_logits
from torch import nn

from kdtune.losses import DivergenceName, Targets, by_autograd, distillation_loss, divergence

NAMES = get_args(DivergenceName)
CASES = [
    *((name, {}) for name in NAMES),
    *((name, {"beta": beta}) for name in ("jsd", "symmetric_kl") for beta in (0.03, 0.9)),
    *((name, {"alpha": alpha}) for name in ("skew_forward_kl", "skew_reverse_kl") for alpha in (0.01, 0.7)),
]
every_divergence = pytest.mark.parametrize("name", NAMES)
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else str(x))


def values(name, student, teacher, **settings):
    """Of each row."""
    return divergence(name, **settings)(teacher.log_softmax(-1), student.log_softmax(-1))[0]


def defined(name, student, teacher, temperature=1.0, **settings):
    """The sum over the rows and its gradient, times temperature squared, by the definition."""
    student = student.detach().double().requires_grad_()
    p, q = (teacher.double() / temperature).softmax(-1), (student / temperature).softmax(-1)
    kd = DEFINITIONS[name](p, q, **settings).sum() * temperature**2
    return kd.detach(), torch.autograd.grad(kd, student)[0]


def test_every_divergence_is_defined_here():
    assert set(DEFINITIONS) == set(NAMES)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("v", [2, 37, 517])
@every_case
def test_equals_its_definition(name, settings, v, temperature):
    student, teacher = make_logits(v=v)
    kd, grad = kd_and_grad(student, teacher, divergence=divergence(name, **settings), temperature=temperature)
    expected, expected_grad = defined(name, student, teacher, temperature, **settings)
    torch.testing.assert_close(kd, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


@every_case
def test_a_divergence_of_ones_own_gets_the_same_engine(name, settings):
    student, teacher = make_logits()
    definition = partial(DEFINITIONS[name], **settings)
    own = by_autograd(lambda log_p, log_q: definition(log_p.exp(), log_q.exp()))
    kd, grad = kd_and_grad(student, teacher, divergence=own, temperature=1.3)
    expected, expected_grad = kd_and_grad(student, teacher, divergence=divergence(name, **settings), temperature=1.3)
    torch.testing.assert_close(kd, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["adaptive_kl", "jsd", "own"])
def test_compiled_in_one_piece(name):
    """Without a graph break, which would be an error, and with a vocabulary of which a part is looked at first."""
    own = by_autograd(lambda log_p, log_q: DEFINITIONS["jsd"](log_p.exp(), log_q.exp()))
    function = own if name == "own" else divergence(name)
    log_p, log_q = (x.log_softmax(-1) for x in make_logits(v=517))
    torch._dynamo.reset()
    with torch.no_grad():
        for found, expected in zip(
            torch.compile(function, backend="eager", fullgraph=True, dynamic=False)(log_p, log_q),
            function(log_p, log_q),
            strict=True,
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@every_case
def test_of_a_distribution_from_itself_is_nothing_to_the_last_bit(name, settings, temperature, padding):
    student, pad = make_logits(v=517, size=4, dtype=torch.float32)
    teacher = torch.cat([student, pad[:, :padding]], -1)
    kd, grad = kd_and_grad(student, teacher, divergence=divergence(name, **settings), temperature=temperature)
    assert kd == 0
    assert grad.abs().max() == 0


BOUNDS = {
    "jsd": lambda beta=0.5: -beta * math.log(beta) - (1 - beta) * math.log(1 - beta),
    "skew_forward_kl": lambda alpha=0.1: -math.log(alpha),
    "skew_reverse_kl": lambda alpha=0.1: -math.log(alpha),
    "total_variation": lambda: 1.0,
}


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@every_case
def test_lies_within_its_bounds(name, settings, size):
    student, teacher = make_logits(n=200, v=50, size=size, dtype=torch.float32)
    rows = values(name, student, teacher, **settings)
    assert rows.min() >= 0
    if name in BOUNDS:
        assert rows.max() <= BOUNDS[name](**settings) * (1 + 1e-5)


@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if case[0] in BOUNDS])
def test_reaches_its_bound_where_the_distributions_share_no_token(name, settings):
    student, teacher = torch.tensor([[100.0, 0, 0, 100]]), torch.tensor([[0.0, 100, 100, 0]])
    assert values(name, student, teacher, **settings).item() == pytest.approx(BOUNDS[name](**settings), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "swapped", "swapped_settings"),
    [
        ("reverse_kl", {}, "forward_kl", {}),
        ("symmetric_kl", {"beta": 0.2}, "symmetric_kl", {"beta": 0.8}),
        ("jsd", {"beta": 0.2}, "jsd", {"beta": 0.8}),
        ("skew_reverse_kl", {"alpha": 0.2}, "skew_forward_kl", {"alpha": 0.2}),
        ("total_variation", {}, "total_variation", {}),
    ],
)
def test_with_the_roles_swapped(name, settings, swapped, swapped_settings):
    student, teacher = make_logits()
    torch.testing.assert_close(
        values(name, student, teacher, **settings), values(swapped, teacher, student, **swapped_settings)
    )


def test_forward_kl_punishes_what_the_student_leaves_out_and_reverse_kl_what_it_makes_up():
    one, both = torch.tensor([[9.0, 0, 0]]), torch.tensor([[9.0, 9, 0]])
    assert values("forward_kl", one, both) > 3 * values("forward_kl", both, one)
    assert values("reverse_kl", both, one) > 3 * values("reverse_kl", one, both)


@pytest.mark.parametrize(
    ("name", "settings", "factor", "limit"),
    [
        ("jsd", {"beta": 1e-7}, 1e7, "forward_kl"),
        ("jsd", {"beta": 1 - 1e-7}, 1e7, "reverse_kl"),
        ("symmetric_kl", {"beta": 1 - 1e-7}, 1, "forward_kl"),
        ("symmetric_kl", {"beta": 1e-7}, 1, "reverse_kl"),
        ("skew_forward_kl", {"alpha": 1e-7}, 1, "forward_kl"),
        ("skew_reverse_kl", {"alpha": 1e-7}, 1, "reverse_kl"),
    ],
)
def test_tends_to_a_kl_at_the_end_of_its_range(name, settings, factor, limit):
    student, teacher = make_logits(size=1)
    kd, grad = kd_and_grad(student, teacher, divergence=divergence(name, **settings))
    expected, expected_grad = kd_and_grad(student, teacher, divergence=divergence(limit))
    torch.testing.assert_close(factor * kd, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(factor * grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_skewed_divergences_tend_to_half_of_chi_squared_as_the_mixture_tends_to_the_first_of_the_two():
    student, teacher = make_logits(size=0.5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    share = 1e-4
    for name, first in (("skew_forward_kl", p), ("skew_reverse_kl", q)):
        rows = values(name, student, teacher, alpha=1 - share)
        torch.testing.assert_close(rows, share**2 / 2 * ((p - q) ** 2 / first).sum(-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("v", [3, 63, 64, 65, 300, 1500, 2500])
@pytest.mark.parametrize("shape", ["flat", "peaked", "one token"])
def test_adaptive_kl_finds_the_head_of_any_row(shape, v):
    student, teacher = make_logits(n=5, v=v, size={"flat": 0.01, "peaked": 5, "one token": 1}[shape])
    if shape == "one token":
        teacher[:, v // 2] = 20
    kd, grad = kd_and_grad(student, teacher, divergence=divergence("adaptive_kl"))
    expected, expected_grad = defined("adaptive_kl", student, teacher)
    torch.testing.assert_close(kd, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "settings"), [case for case in CASES if case[0] not in ("total_variation", "adaptive_kl")]
)
@pytest.mark.parametrize("v", [50, 1500])
def test_float32_is_accurate_where_a_student_is_close_to_its_teacher(name, settings, v):
    student, teacher = make_logits(n=20, v=v, dtype=torch.float32)
    student = teacher + 7e-4 * student
    kd, grad = kd_and_grad(student, teacher, num_tokens=20, divergence=divergence(name, **settings))
    expected, expected_grad = defined(name, student, teacher, **settings)
    assert kd < 2e-6
    torch.testing.assert_close(kd.double(), expected / 20, rtol=0.01, atol=0)
    assert (20 * grad - expected_grad).norm() < 0.005 * expected_grad.norm()


def masked_kd_and_grad(student, teacher, student_bias, teacher_bias, **settings):
    heads = [nn.Linear(x.shape[-1], x.shape[-1], dtype=x.dtype) for x in (student, teacher)]
    with torch.no_grad():
        for head, bias in zip(heads, (student_bias, teacher_bias), strict=True):
            nn.init.eye_(head.weight)
            head.bias.copy_(bias)
    student = student.detach().requires_grad_()
    labels = torch.zeros(student.shape[:-1], dtype=torch.long)
    loss = distillation_loss(
        student, heads[0], labels, 1, Targets(teacher, heads[1]), ce_weight=0.0, kd_weight=1.0, **settings
    )
    return loss.kd, torch.autograd.grad(loss.total, student)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ruled_out_by", ["student", "teacher", "both"])
@every_case
def test_tokens_ruled_out(name, settings, ruled_out_by, temperature, dtype):
    student, teacher = make_logits(dtype=dtype)
    ruled_out = torch.zeros(student.shape[-1], dtype=dtype)
    ruled_out[5:9] = -torch.inf
    student_bias = 0 * student[0] if ruled_out_by == "teacher" else ruled_out
    teacher_bias = 0 * teacher[0] if ruled_out_by == "student" else ruled_out
    kd, grad = masked_kd_and_grad(
        student,
        teacher,
        student_bias,
        teacher_bias,
        divergence=divergence(name, **settings),
        temperature=temperature,
    )
    expected, expected_grad = defined(name, student + student_bias, teacher + teacher_bias, temperature, **settings)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(kd.double(), expected, rtol=tolerance, atol=0)
    if expected.isfinite():
        torch.testing.assert_close(grad.double(), expected_grad, rtol=100 * tolerance, atol=tolerance)


@every_divergence
def test_huge_logits(name):
    student, teacher = make_logits(n=1, dtype=torch.float32)
    for logits in (student, teacher):
        logits[0, 3], logits[0, 4] = 1e30, -1e30
    kd, grad = kd_and_grad(student, teacher, divergence=divergence(name))
    assert kd == 0
    assert grad.abs().max() == 0
    teacher[0, 3] = 0  # now it is quite sure of the fifth token, and the student of the fourth
    teacher[0, 5] = 1e30
    kd, grad = kd_and_grad(student, teacher, divergence=divergence(name))
    assert not kd.isnan()
    assert not grad.isnan().any()
    if name in BOUNDS:
        assert kd.item() == pytest.approx(BOUNDS[name](), rel=1e-5)


def test_the_divergence_of_a_step_is_the_sum_over_its_rows():
    student, teacher = make_logits()
    for name in NAMES:
        kd = loss_of_logits(student, teacher, divergence=divergence(name)).kd
        torch.testing.assert_close(kd, values(name, student, teacher).sum())


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("forward_kl", {"beta": 0.5}, "beta=0.5 does not apply to forward_kl; it belongs to symmetric_kl and jsd"),
        ("jsd", {"alpha": 0.5}, "alpha=0.5 does not apply to jsd; it belongs to skew_forward_kl and skew_reverse_kl"),
        ("skew_reverse_kl", {"alpha": 0.1, "beta": 0.5}, "beta=0.5 does not apply"),
        *(("jsd", {"beta": beta}, f"beta={beta}: jsd needs one between 0 and 1") for beta in (0, 1, -0.1, 2)),
        ("skew_forward_kl", {"alpha": 1.0}, "alpha=1.0: skew_forward_kl needs one between 0 and 1"),
        ("kullback", {}, "no divergence .kullback.; known are forward_kl, reverse_kl"),
    ],
)
def test_refusals(name, settings, reason):
    with pytest.raises(ValueError, match=reason):
        divergence(name, **settings)


def test_the_same_settings_are_the_same_function():
    """Compiled code is made for a function, not for what it computes."""
    assert divergence("jsd", beta=0.3) is divergence("jsd", beta=0.3)
