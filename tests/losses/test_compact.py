"""Targets of the labelled positions alone, as a cache has them; and that nothing waits for their data."""

import pytest
import torch
from problems import identity, loss_of_logits, make_logits, make_problem, values_of
from test_sampled import draw
from test_targets import known, top_k

from kdtune.losses import IGNORE, SampledTargets, Targets, TopKTargets, distillation_loss

KINDS = ["hidden", "top k", "samples"]


def whole_and_compact(kind, teacher, labels):
    """Of all positions of logits [b, s, v], and of those with a label."""

    def parts(targets, mask=None):
        fields = {name: x for name, x in vars(targets).items() if x is not None}
        for name, x in fields.items():
            if isinstance(x, torch.Tensor):
                fields[name] = x if mask is None else x[mask]
        return type(targets)(**fields)

    targets = Targets(teacher, identity(teacher)) if kind == "hidden" else known(teacher, labels, kind)
    return targets, parts(targets, labels != IGNORE)


def total_and_grad(student, targets, labels, **settings):
    student = student.detach().requires_grad_()
    loss = loss_of_logits(student, targets, labels, 19, ce_weight=0.4, **settings)
    return *values_of(loss).values(), torch.autograd.grad(loss.total, student)[0]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_those_of_all_positions(kind, chunk_size, given):
    student, teacher = (x.view(3, 9, 37) for x in make_logits(n=27))
    labels = (torch.arange(27) % 37).masked_fill(torch.arange(27) % 4 != 1, IGNORE).view(3, 9)
    settings = {"chunk_size": chunk_size, "with_metrics": True, "balance": chunk_size == 4}
    if given:
        settings["scored"] = (labels.flatten() != IGNORE).nonzero()[:, 0]
    whole, compact = whole_and_compact(kind, teacher, labels)
    for a, b in zip(
        total_and_grad(student, compact, labels, **settings),
        total_and_grad(student, whole, labels, **settings),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_none_for_a_batch_without_labels(kind):
    student, teacher = (x.view(3, 9, 37) for x in make_logits(n=27))
    labels = torch.full((3, 9), IGNORE)
    _, compact = whole_and_compact(kind, teacher, labels)
    *values, grad = total_and_grad(student, compact, labels, with_metrics=True)
    assert [x.item() for x in values] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_as_there_are_labels(kind):
    student, teacher = (x.view(3, 9, 37) for x in make_logits(n=27))
    labels = torch.zeros(3, 9, dtype=torch.long)
    labels[0, 4] = IGNORE
    _, compact = whole_and_compact(kind, teacher, labels)
    labels[0, 5] = IGNORE
    with pytest.raises(ValueError, match="the teacher's targets are of 26 positions, and 25 have a label"):
        loss_of_logits(student, compact, labels)


@pytest.mark.parametrize("kind", ["bucket", "renormalised", "partial", "student_full", "samples"])
def test_a_step_without_data(kind):
    """As `kdtune plan` makes it: whatever had to look at a number would fail."""
    _, teacher = make_logits(n=20, v=37, dtype=torch.float32)
    targets = draw(teacher, 12, 1.0) if kind == "samples" else top_k(teacher, 8, kind)
    fields = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in vars(targets).items()}
    fields |= dict.fromkeys(("entropy", "label_log_probs", "top_ids"), torch.zeros(20, device="meta"))
    targets = SampledTargets(**fields) if kind == "samples" else TopKTargets(**fields)
    hidden, head, _, _, _ = make_problem(torch.float32, v=40, b=4, s=9)
    hidden, head = hidden.detach().to("meta").requires_grad_(), head.to("meta")
    labels, scored = (torch.zeros(shape, dtype=torch.long, device="meta") for shape in ((4, 9), (20,)))
    settings = {"scored": scored, "kd_weight": 0.5, "with_metrics": True, "chunk_size": 8}
    distillation_loss(hidden, head, labels, 20, targets, **settings).total.backward()
    assert hidden.grad.shape == hidden.shape
    assert head.weight.grad.shape == head.weight.shape


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [None, 69_000])
@pytest.mark.parametrize("kind", ["top k", "samples"])
def test_compiled_equals_eager(kind, vocab_size):
    hidden, head, teacher_hidden, teacher_head, labels = make_problem(dtype=torch.float32, v=70_001)
    scored = labels != IGNORE
    targets = known(teacher_head(teacher_hidden).detach()[scored], labels[scored], kind)
    fields = vars(targets) | {"vocab_size": vocab_size, "ids": targets.ids[:, :20].clone()}
    fields["ids"][::3, 15:] = -1
    numbers = "weights" if kind == "samples" else "log_probs"
    fields[numbers] = fields[numbers][:, :20]
    settings = {"ce_weight": 0.5, "kd_weight": 0.5, "with_metrics": True}
    results = []
    for compile in (False, True):
        loss = distillation_loss(hidden, head, labels, 80, type(targets)(**fields), compile=compile, **settings)
        results.append([*values_of(loss).values(), *torch.autograd.grad(loss.total, (hidden, head.weight))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
