"""Relations between tokens: how alike the queries, keys or values of a layer are to each other.

    R(x)[a, i, :] = softmax over j of  x[a, i] . x[a, j] / sqrt(w)        j up to i, in the same document
    relation      = mean over a of  sum over j of  R(t) (log R(t) - log R(s))        of a token i

a counts relation heads, w wide, into which the numbers of all heads are cut anew: so numbers of heads and widths of
student and teacher may differ (Wang et al. 2020, "MiniLMv2", arXiv:2012.15828, section 3.1). There a token sees all
others; here, as in attention of these models, itself and those before it. All of it is in float32, or in float64 for
such models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def relation(s: Tensor, t: Tensor, counted: Tensor, first: Tensor, num_heads: int, block: int) -> Tensor:
    """The sum over tokens that count, a number.

    Args:
        s: of the student, [b, s, h, n].
        t: of the teacher, [b, s, h_t, n_t].
        counted: [b, s].
        first: [b, s], where the document of each token begins.
        num_heads: relation heads, a divisor of h n and of h_t n_t.
        block: numbers of relations that exist at one time.
    """
    total: Tensor = _Relation.apply(s, t, counted, first, num_heads, block)
    return total


class _Relation(torch.autograd.Function):
    """Its gradient is computed in the forward, some queries at a time, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, counted: Tensor, first: Tensor, num_heads: int, block: int) -> Tensor:
        dtype = torch.promote_types(s.dtype, torch.float32)
        length = s.size(1)
        size = max(1, block // (num_heads * length))
        place = torch.arange(length, device=s.device)
        total, grads = s.new_zeros((), dtype=dtype), []
        for row in range(len(s)):
            wide, of_teacher = (
                x[row].detach().to(dtype).flatten(1).unflatten(1, (num_heads, -1)).transpose(0, 1) for x in (s, t)
            )  # [heads, s, w]
            grad = torch.zeros_like(wide)
            for begin in range(0, length, size):
                queries = slice(begin, begin + size)
                keys = place[: begin + size]
                visible = (keys <= place[queries, None]) & (keys >= first[row, queries, None])  # [q, k]
                with torch.enable_grad():
                    part = wide.detach().requires_grad_()
                    log_p, log_q = (_log_relations(x, queries, visible) for x in (of_teacher, part))
                    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean(0)  # [q]
                    divergence = (divergence * counted[row, queries]).sum()
                    grad += torch.autograd.grad(divergence, part)[0]
                total += divergence.detach()
            grads.append(grad.transpose(0, 1).flatten(1).view(s.shape[1:]).to(s.dtype))
        ctx.save_for_backward(torch.stack(grads))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(grad.dtype), None, None, None, None, None


def _log_relations(x: Tensor, queries: slice, visible: Tensor) -> Tensor:
    """[heads, q, k] of x, [heads, s, w]."""
    scores = x[:, queries] @ x[:, : visible.size(1)].transpose(1, 2) / math.sqrt(x.size(-1))
    # Not minus infinity, whose difference to itself is NaN.
    return scores.masked_fill(~visible, torch.finfo(x.dtype).min / 2).log_softmax(-1)
