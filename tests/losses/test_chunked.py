"""The chunked objective against its definition in dense float64 autograd."""

import pytest
import torch
from problems import chunked, dense_loss, make_problem
from torch import nn

from kdtune.losses import IGNORE, distillation_loss, rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_size", [1, 7, 10_000])
@pytest.mark.parametrize(("v", "v_t"), [(123, 123), (123, 130), (130, 123)])
def test_equals_dense_autograd(chunk_size, v, v_t, temperature):
    problem = make_problem(v=v, v_t=v_t, bias=chunk_size == 7)
    hidden, head = problem[:2]
    expected, ce, kd = dense_loss(*problem, 50, 0.3, temperature)
    inputs = (hidden, *head.parameters())
    expected_grads = torch.autograd.grad(expected, inputs)
    loss = chunked(problem, 50, 0.3, temperature=temperature, chunk_size=chunk_size)
    grads = torch.autograd.grad(loss.total, inputs)
    torch.testing.assert_close(
        torch.stack([loss.total, loss.ce, loss.kd]), torch.stack([expected, ce, kd]), rtol=1e-12, atol=1e-12
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-13)


def test_gradcheck():
    hidden, head, teacher_hidden, teacher_head, labels = make_problem(v=11, d=5, d_t=4, b=1, s=6)

    def total(hidden, weight):
        student_head = nn.Linear(5, 11, bias=False, device="meta")
        del student_head.weight  # a plain tensor in its place, so that gradcheck can perturb it
        student_head.weight = weight
        return chunked(
            (hidden, student_head, teacher_hidden, teacher_head, labels), temperature=1.7, chunk_size=2
        ).total

    assert torch.autograd.gradcheck(total, (hidden, head.weight))


def test_the_loss_scales_with_the_incoming_gradient():
    problem = make_problem()
    loss = chunked(problem)
    (once,) = torch.autograd.grad(loss.total, problem[0])
    (thrice,) = torch.autograd.grad(3 * chunked(problem).total, problem[0])
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teacher_equal_to_student_has_no_divergence_and_no_gradient(temperature):
    hidden, head, _, _, labels = make_problem(dtype=torch.float32)
    loss = chunked((hidden, head, hidden.detach(), head, labels), kd_ratio=1.0, temperature=temperature)
    (grad,) = torch.autograd.grad(loss.total, hidden)
    assert loss.kd.abs() < 1e-6
    assert grad.abs().max() < 1e-8


def test_no_kd_weight_is_plain_cross_entropy_bit_for_bit():
    problem = make_problem(dtype=torch.float32)
    hidden, head, _, _, labels = problem
    blended, plain = chunked(problem, 60, kd_ratio=0.0), distillation_loss(hidden, head, labels, 60)
    inputs = (hidden, head.weight)
    assert torch.equal(blended.total, plain.total)
    for a, b in zip(torch.autograd.grad(blended.total, inputs), torch.autograd.grad(plain.total, inputs), strict=True):
        assert torch.equal(a, b)


def test_temperature_reaches_the_divergence_and_only_it():
    problem = make_problem()
    cold, warm = chunked(problem, temperature=1.0), chunked(problem, temperature=4.0)
    assert torch.equal(cold.ce, warm.ce)
    assert not torch.isclose(cold.kd, warm.kd)


def test_the_gradient_does_not_vanish_with_temperature_unless_unscaled():
    problem = make_problem()

    def norm(temperature, scaled):
        loss = chunked(problem, kd_ratio=1.0, temperature=temperature, scale_by_temperature_squared=scaled)
        return torch.autograd.grad(loss.total, problem[0])[0].norm()

    torch.testing.assert_close(norm(8.0, True), 64 * norm(8.0, False))
    assert norm(64.0, True) > 0.1 * norm(1.0, True) > norm(64.0, False)


def test_ignored_positions_have_no_gradient_and_no_influence():
    problem = make_problem()
    hidden, head, teacher_hidden, teacher_head, labels = problem
    loss = chunked(problem)
    (grad,) = torch.autograd.grad(loss.total, hidden)
    assert grad[labels == IGNORE].abs().max() == 0
    changed = torch.where((labels == IGNORE)[..., None], torch.full_like(hidden, float("nan")), hidden)
    again = chunked((changed.detach().requires_grad_(), head, teacher_hidden, teacher_head, labels))
    assert torch.equal(loss.total, again.total)


def test_nothing_labelled_is_zero_with_a_graph():
    hidden, head, teacher_hidden, teacher_head, labels = make_problem()
    loss = chunked((hidden, head, teacher_hidden, teacher_head, torch.full_like(labels, IGNORE)), 1)
    loss.total.backward()
    assert loss.total.item() == 0
    assert hidden.grad.abs().max() == 0
    assert head.weight.grad.abs().max() == 0


def test_a_teacher_that_rules_entries_out_gives_finite_values():
    hidden, head, teacher_hidden, teacher_head, labels = make_problem(bias=True)
    with torch.no_grad():
        teacher_head.bias[5:20] = float("-inf")
    loss = chunked((hidden, head, teacher_hidden, teacher_head, labels), kd_ratio=1.0)
    (grad,) = torch.autograd.grad(loss.total, hidden)
    assert torch.isfinite(loss.kd)
    assert torch.isfinite(grad).all()


def test_metrics_against_their_definitions():
    problem = make_problem()
    hidden, head, teacher_hidden, teacher_head, labels = problem
    mask = labels != IGNORE
    log_p = teacher_head(teacher_hidden)[mask].log_softmax(-1)
    loss = chunked(problem, with_metrics=True, temperature=2.0, chunk_size=5)
    agreement = (head(hidden)[mask].argmax(-1) == log_p.argmax(-1)).double().mean()
    torch.testing.assert_close(loss.agreement, agreement)
    torch.testing.assert_close(loss.teacher_ce, nn.functional.nll_loss(log_p, labels[mask]))
    torch.testing.assert_close(loss.teacher_entropy, -(log_p.exp() * log_p).sum(-1).mean())


def test_refusals():
    hidden, head, _, _, labels = make_problem()
    with pytest.raises(ValueError, match="teacher"):
        distillation_loss(hidden, head, labels, 1, kd_weight=0.5)
    with pytest.raises(ValueError, match="temperature"):
        chunked(make_problem(), temperature=0.0)


def test_validation_pays_for_no_gradient(monkeypatch):
    asked = []
    score = rows.score
    monkeypatch.setattr(rows, "score", lambda *args: asked.append(args[5].with_grad) or score(*args))
    problem = make_problem()
    with_grad = chunked(problem)
    with torch.no_grad():
        without = chunked(problem)
    assert asked == [True, False]
    assert without.total == with_grad.total
    assert not without.total.requires_grad


def test_no_label_in_the_whole_step_is_refused():
    hidden, head, _, _, labels = make_problem()
    with pytest.raises(ValueError, match="num_tokens=0: a step without a labelled token"):
        distillation_loss(hidden, head, torch.full_like(labels, IGNORE), 0)
