"""The objective on a CUDA device: products of bf16 into float32, compiled blocks, and the memory they take.

pytest -m gpu tests/gpu
"""

import copy

import pytest
import torch
from torch import nn

from kdtune.losses import IGNORE, SampledTargets, Targets, TopKTargets, distillation_loss

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def make_problem(dtype, tokens=300, vocabulary=5_003, width=64, teacher_width=128):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    head, teacher_head = (
        nn.Linear(d, vocabulary, bias=False, device=DEVICE, dtype=dtype) for d in (width, teacher_width)
    )
    hidden = randn(1, tokens, width).requires_grad_()
    teacher_hidden = randn(1, tokens, teacher_width)
    labels = torch.randint(vocabulary, (1, tokens), generator=generator).to(DEVICE)
    labels[:, ::3] = -100
    return hidden, head, teacher_hidden, teacher_head, labels


def gradients(problem, **settings):
    hidden, head, teacher_hidden, teacher_head, labels = problem
    loss = distillation_loss(
        hidden,
        head,
        labels,
        200,
        Targets(teacher_hidden, teacher_head),
        ce_weight=0.3,
        kd_weight=0.7,
        chunk_size=64,
        **settings,
    )
    return loss, torch.autograd.grad(loss.total, (hidden, head.weight))


def in_float64(problem):
    hidden, head, teacher_hidden, teacher_head, labels = problem
    doubles = []
    for linear in (head, teacher_head):
        double = nn.Linear(linear.in_features, linear.out_features, bias=False, device=DEVICE, dtype=torch.float64)
        double.load_state_dict(linear.state_dict())
        doubles.append(double)
    return hidden.detach().double().requires_grad_(), doubles[0], teacher_hidden.double(), doubles[1], labels


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-3), (torch.float16, 1e-2)])
def test_gradients_are_those_of_float64(dtype, bound, compile):
    problem = make_problem(dtype)
    loss, grads = gradients(problem, compile=compile)
    exact, exact_grads = gradients(in_float64(problem))
    torch.testing.assert_close(loss.total.double(), exact.total, rtol=1e-4, atol=0)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert (grad.double() - exact_grad).norm() / exact_grad.norm() < bound


def known(problem, kind):
    """Of the labelled positions alone, as a cache has it."""
    _, _, teacher_hidden, teacher_head, labels = problem
    hidden = teacher_hidden[labels != IGNORE]
    if kind == "hidden":
        return Targets(hidden, teacher_head)
    log_p = teacher_head(hidden).detach().float().log_softmax(-1)
    log_probs, ids = log_p.topk(20)
    ids[::3, 12:] = -1
    if kind == "samples":
        return SampledTargets(ids.int(), log_probs.exp(), torch.special.entr(log_p.exp()).sum(-1))
    return TopKTargets(ids.int(), log_probs, convention=kind)


@pytest.mark.parametrize("kind", ["hidden", "bucket", "renormalised", "partial", "student_full", "samples"])
def test_targets_from_a_cache(kind):
    """As on the CPU, and without waiting for the device, but once to find the labelled positions if nobody tells."""
    problem = make_problem(torch.float32)
    hidden, head, _, _, labels = problem
    targets, settings = known(problem, kind), {"ce_weight": 0.3, "kd_weight": 0.7, "chunk_size": 64}
    scored = (labels.flatten() != IGNORE).nonzero()[:, 0]
    on_cpu = [hidden.detach().cpu().requires_grad_(), copy.deepcopy(head).cpu(), labels.cpu(), 200]
    parts = (x.cpu() if isinstance(x, (torch.Tensor, nn.Module)) else x for x in copy.deepcopy(vars(targets)).values())
    expected = distillation_loss(*on_cpu, type(targets)(*parts), **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = distillation_loss(hidden, head, labels, 200, targets, scored=scored, **settings)
        grads = torch.autograd.grad(loss.total, (hidden, head.weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.total.cpu(), expected.total, rtol=1e-4, atol=0)
    for grad, exact in zip(grads, torch.autograd.grad(expected.total, (on_cpu[0], on_cpu[1].weight)), strict=True):
        assert (grad.cpu() - exact).norm() / exact.norm() < 1e-4


def test_memory_does_not_grow_with_the_tokens():
    peaks = []
    for tokens in (4_096, 16_384):
        problem = make_problem(torch.bfloat16, tokens=tokens, vocabulary=32_003)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(problem)
        peaks.append(torch.cuda.max_memory_allocated() - before - 2 * problem[0].nbytes)
        del problem
    assert peaks[1] < 1.05 * peaks[0]
