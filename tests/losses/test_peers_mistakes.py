"""What other tools got wrong in their losses, as what must hold here.

That a teacher equal to its student has no divergence is in test_divergences.py, that a top k keeps the mass of the rest
in test_targets.py, that a position without label does not count in test_chunked.py.
"""

import pytest
import torch
from problems import chunked, kd_and_grad, loss_of_logits, make_logits, make_problem, values_of
from torch import nn

from kdtune.losses import IGNORE, TopKTargets, distillation_loss, divergence


def totals_and_grads(problem, parts, **settings):
    """Of a step whose sequences arrive in these parts: the sum of the losses, and what the backwards leave behind."""
    hidden, head, teacher_hidden, teacher_head, labels = problem
    hidden = hidden.detach().requires_grad_()
    head.zero_grad()
    num_tokens = int((labels != IGNORE).sum())
    total = 0
    for part in parts:
        micro_batch = (hidden[part], head, teacher_hidden[part], teacher_head, labels[part])
        loss = chunked(micro_batch, num_tokens, **settings)
        loss.total.backward()
        total += loss.total.item()
    return torch.tensor(total), hidden.grad, head.weight.grad.clone()


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "adaptive_kl"])
@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [2, 0]]])
def test_a_step_does_not_depend_on_its_split_into_micro_batches(parts, name):
    """Which have very different numbers of labelled tokens, one of them none."""
    problem = make_problem(b=4)
    labels = problem[-1]
    labels[0, 5:], labels[1] = IGNORE, IGNORE
    settings = {"divergence": divergence(name), "temperature": 1.5}
    whole = totals_and_grads(problem, [[0, 1, 2, 3]], **settings)
    for a, b in zip(totals_and_grads(problem, parts, **settings), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_a_step_does_not_depend_on_padding_or_packing():
    hidden, head, teacher_hidden, teacher_head, labels = problem = make_problem()
    mask = labels != IGNORE
    packed = (hidden[mask][None], head, teacher_hidden[mask][None], teacher_head, labels[mask][None])
    padded = [nn.functional.pad(x, (0, 0, 0, 9)) for x in (hidden, teacher_hidden)]
    padded = (padded[0], head, padded[1], teacher_head, nn.functional.pad(labels, (0, 9), value=IGNORE))
    losses = [chunked(x, with_metrics=True) for x in (problem, packed, padded)]
    for loss in losses[1:]:
        torch.testing.assert_close(values_of(loss), values_of(losses[0]))


def test_the_number_of_tokens_is_the_only_divisor():
    """Neither sequences nor the vocabulary, as in a mean over all elements."""
    student, teacher = make_logits(dtype=torch.float32)
    once, _ = kd_and_grad(student, teacher, num_tokens=29)
    by_others, _ = kd_and_grad(student, teacher, num_tokens=58)
    torch.testing.assert_close(once, 2 * by_others)
    twice, _ = kd_and_grad(torch.cat([student] * 2), torch.cat([teacher] * 2), num_tokens=58)
    torch.testing.assert_close(once, twice)
    nowhere = [nn.functional.pad(x, (0, 99), value=-1e4) for x in (student, teacher)]  # entries that nobody predicts
    torch.testing.assert_close(once, kd_and_grad(*nowhere, num_tokens=29)[0])


@pytest.mark.parametrize("settings", [None, {"balance": True}, {"with_metrics": True}, {"label_margin": 0.1}])
def test_nothing_labelled_is_a_zero_that_other_ranks_can_wait_for(settings):
    """Neither NaN nor without a graph: each parameter gets its gradient, which ranks add up together."""
    hidden, head, teacher_hidden, teacher_head, labels = make_problem(bias=True)
    labels = torch.full_like(labels, IGNORE)
    if settings is None:
        loss = distillation_loss(hidden, head, labels, 7)
    else:
        loss = chunked((hidden, head, teacher_hidden, teacher_head, labels), 7, **settings)
    assert (loss.total, loss.ce, loss.kd, loss.kd_factor) == (0, 0, 0, 1)
    loss.total.backward()
    for parameter in (hidden, *head.parameters()):
        assert parameter.grad.abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation"])
def test_padding_of_a_vocabulary_gets_no_probability(name, temperature):
    """On neither side: what the padding's logits are does not matter, and the divergence does not train them."""
    small, large = make_logits(v=37), make_logits(v=45, seed=1)
    settings = {"divergence": divergence(name), "temperature": temperature}
    for student, teacher in ((small[0], large[1]), (large[0], small[1])):
        kd, grad = kd_and_grad(student, teacher, **settings)
        expected, expected_grad = kd_and_grad(student[:, :37], teacher[:, :37], **settings)
        torch.testing.assert_close(kd, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad[:, :37], expected_grad, rtol=1e-10, atol=1e-14)
        assert (grad[:, 37:] == 0).all()
    changed = torch.cat([large[1][:, :37], large[1][:, 37:] + 50], -1)
    assert torch.equal(kd_and_grad(small[0], changed, **settings)[0], kd_and_grad(small[0], large[1], **settings)[0])


@pytest.mark.parametrize("label_margin", [0.0, 0.2])  # the teacher cannot be moved towards a token that it has not
def test_a_label_beyond_the_teachers_vocabulary_only_counts_in_the_cross_entropy(label_margin):
    student, teacher = make_logits(v=45)[0], make_logits(v=37)[1]
    labels = torch.full((29,), 41)
    loss = loss_of_logits(student, teacher, labels, 29, label_margin=label_margin)
    torch.testing.assert_close(loss.ce, nn.functional.cross_entropy(student, labels))
    torch.testing.assert_close(loss.kd, loss_of_logits(student, teacher, torch.zeros_like(labels), 29).kd)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_temperature_squared_is_in_the_value_and_in_its_gradient(name, temperature, scaled):
    student, teacher = make_logits(n=4)
    settings = {"divergence": divergence(name), "temperature": temperature, "scale_by_temperature_squared": scaled}
    kd, grad = kd_and_grad(student, teacher, **settings)
    at_1, _ = kd_and_grad(student / temperature, teacher / temperature, divergence=divergence(name))
    torch.testing.assert_close(kd, at_1 * (temperature**2 if scaled else 1))
    step = 1e-6 * make_logits(n=4, seed=1)[0]
    ahead, behind = (loss_of_logits(student + x, teacher, **settings).total for x in (step, -step))
    torch.testing.assert_close((step * grad).sum(), (ahead - behind) / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("position", [0, 3, 6])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_label_is_scored_at_its_own_position(position, sparse):
    """The first of an answer too, and none after the last: shifting is done where labels are made, once."""
    student, teacher = make_logits(n=7)
    labels = torch.full((7,), IGNORE)
    labels[position] = 5
    targets = teacher
    if sparse:
        log_probs, ids = teacher.log_softmax(-1).topk(37)
        targets = TopKTargets(ids, log_probs)
    student.requires_grad_()
    loss = loss_of_logits(student, targets, labels, ce_weight=1.0)
    (grad,) = torch.autograd.grad(loss.total, student)
    here = slice(position, position + 1)
    torch.testing.assert_close(loss.ce, nn.functional.cross_entropy(student[here], labels[here]))
    torch.testing.assert_close(loss.kd, kd_and_grad(student[here], teacher[here])[0])
    assert grad.any(-1).nonzero().tolist() == [[position]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_heads_gradient_is_added_up_in_float32(dtype):
    """2,048 equal contributions: where sums are bf16, those after the 256th are rounded away."""
    hidden, head, teacher_hidden, teacher_head, _ = make_problem(dtype=dtype, b=1, s=1, bias=True)
    labels = torch.full((1, 2048), 3)

    def grads(count):
        head.zero_grad()
        one = [x.detach().expand(1, count, -1) for x in (hidden, teacher_hidden)]
        problem = (one[0], head, one[1], teacher_head, labels[:, :count])
        chunked(problem, count, chunk_size=1).total.backward()
        return [p.grad.float() for p in head.parameters()]

    # Each of the 2,048 is rounded once for the product, 2^-9 of itself at most; the sum once more.
    for many, one in zip(grads(2048), grads(1), strict=True):
        torch.testing.assert_close(many, one, rtol=2**-6, atol=1e-5)


def test_what_is_logged_of_a_balanced_loss_is_its_parts_as_they_are():
    """The total is then a multiple of the cross-entropy, and tells nothing of the teacher."""
    problem = make_problem()
    plain, balanced = chunked(problem, kd_ratio=0.25), chunked(problem, kd_ratio=0.25, balance=True)
    assert torch.equal(plain.ce, balanced.ce)
    assert torch.equal(plain.kd, balanced.kd)
    torch.testing.assert_close(balanced.total, 0.75 * plain.ce + 0.25 * balanced.kd_factor * plain.kd)
    torch.testing.assert_close(balanced.total, plain.ce)


def test_a_divergence_is_not_a_cross_entropy():
    """Whose gradient is the same, and whose value has the teacher's entropy on top."""
    student, teacher = make_logits()
    loss = loss_of_logits(student, teacher, with_metrics=True)
    cross_entropy = -(teacher.softmax(-1) * student.log_softmax(-1)).sum()
    torch.testing.assert_close(loss.kd + loss.teacher_entropy, cross_entropy)


def test_an_untrained_teacher_can_be_told_from_its_cross_entropy():
    """A recipe once distilled from a teacher of zeros: on the labels it is as bad as a guess."""
    hidden, head, teacher_hidden, teacher_head, labels = make_problem()
    nn.init.zeros_(teacher_head.weight)
    loss = chunked((hidden, head, teacher_hidden, teacher_head, labels), with_metrics=True)
    guess = torch.tensor(123.0, dtype=torch.float64).log()
    torch.testing.assert_close(torch.stack([loss.teacher_ce, loss.teacher_entropy]), guess.expand(2))
