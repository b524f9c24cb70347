"""Relations between tokens, against their definition: every number of it in a loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import identity
from torch import Tensor

from kdtune.losses import IGNORE, HiddenLoss, Pair, Targets
from kdtune.losses import hidden as engine

# A row of two documents and padding, and one of a document.
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
LABELS = torch.tensor([[IGNORE, 3, 4, IGNORE, 5, 6, 7, IGNORE, IGNORE], [7, IGNORE, 1, 2, 0, 3, IGNORE, 4, 9]])


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(s: Tensor, t: Tensor, num_heads: int, num_tokens: int, positions: Tensor) -> Tensor:
    total: Any = 0
    for row, i in (LABELS != IGNORE).nonzero().tolist():
        begin = i - int(positions[row, i])
        for head in range(num_heads):
            logs = []
            for x in (s, t):
                numbers = x[row].flatten(1).double()
                width = numbers.size(1) // num_heads
                own = numbers[:, head * width : (head + 1) * width]
                scores = torch.stack([own[i] @ own[j] / math.sqrt(width) for j in range(begin, i + 1)])
                logs.append(scores - scores.logsumexp(0))
            log_q, log_p = logs
            total = total + (log_p.exp() * (log_p - log_q)).sum() / num_heads
    return total / num_tokens


def found(s: Tensor, t: Tensor, num_heads: int, num_tokens: int, positions: Tensor | None = POSITIONS) -> Tensor:
    loss = HiddenLoss([Pair("s", "t", "relation")], relation_heads=num_heads)
    targets = Targets(t.flatten(2), identity(t.flatten(2)), {"t": t})
    return loss({"s": s}, targets, LABELS, num_tokens, None, positions)[0]


@pytest.mark.parametrize("block", [1, 40, 2**20])
@pytest.mark.parametrize(
    ("heads", "teacher_heads", "num_heads"), [((2, 6), (2, 6), 2), ((2, 6), (3, 8), 4), ((4, 3), (1, 6), 1)]
)
def test_values_and_gradients(
    heads: tuple[int, int], teacher_heads: tuple[int, int], num_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For heads of any number and size, of one query at a time and of all."""
    monkeypatch.setattr(engine, "BLOCK", block)
    s, t = rand(2, 9, *heads, seed=0).requires_grad_(), rand(2, 9, *teacher_heads, seed=1)
    value, expected = found(s, t, num_heads, 11), by_definition(s, t, num_heads, 11, POSITIONS)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (grad,), (other,) = torch.autograd.grad(3 * value, s), torch.autograd.grad(3 * expected, s)
    torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-14)
    assert not grad[0, 7:].any(), "padding"
    assert grad.abs().sum() > 0


def test_a_row_is_one_document_unless_told() -> None:
    s, t = rand(2, 9, 2, 6, seed=0), rand(2, 9, 2, 6, seed=1)
    whole = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(found(s, t, 2, 5, None), by_definition(s, t, 2, 5, whole), rtol=1e-12, atol=0)


def test_bf16_is_compared_in_float32() -> None:
    s, t = (rand(2, 9, 2, 6, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    s.requires_grad_()
    value, expected = found(s, t, 2, 11), by_definition(s, t, 2, 11, POSITIONS)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    (grad,), (other,) = torch.autograd.grad(value, s), torch.autograd.grad(expected, s)
    torch.testing.assert_close(grad, other, rtol=2**-6, atol=1e-3)


def test_equals_differ_by_nothing() -> None:
    """Whatever turns all tokens alike: relations do not see it."""
    s = rand(2, 9, 2, 6, seed=0).requires_grad_()
    turn = torch.linalg.qr(rand(6, 6, seed=2))[0]
    for t in (s.detach(), s.detach() @ turn):
        value = found(s, t, 2, 11)
        assert abs(value.item()) < 1e-12
        assert torch.autograd.grad(value, s)[0].abs().max() < 1e-12
