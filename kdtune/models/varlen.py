"""Attention within documents of any length on the CPU, as one operator; CUDA has `torch.nn.attention.varlen`.

As an operator it is opaque to torch.compile: code is not made anew for each number of documents and each length, and
the layer around it stays one piece. It also keeps its tensors once, not once more by the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def attend_within(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, mask: Tensor | None, window: int | None
) -> Tensor:
    """Causal attention within documents that lie behind each other.

    Args:
        queries: [t, h, n].
        keys: [t, h_kv, n], where h_kv divides h.
        values: [t, h_kv, n].
        starts: [m + 1] int32, where each document begins, and the end.
        mask: [1, 1, l, l] of the longest document, whose corner is added to the scores of one longer than the window.
        window: how far back a token sees, itself included; None: to the start of its document.

    Returns:
        [t, h, n].
    """
    out, _ = torch.ops.kdtune.attend_within(queries, keys, values, starts, mask, window)
    return out


# `torch.library.custom_op` would import torch._dynamo with the first call: seconds.
_library = torch.library.Library("kdtune", "FRAGMENT")
_heads_and_documents = "Tensor queries, Tensor keys, Tensor values, {}Tensor starts, Tensor? mask, SymInt? window"
_library.define(f"attend_within({_heads_and_documents.format('')}) -> (Tensor, Tensor)")
_library.define(
    f"attend_within_backward(Tensor grad, {_heads_and_documents.format('Tensor out, Tensor log_sums, ')})"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl("kdtune::attend_within", "CPU")
def _attend_within(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, mask: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithms of the sums of the softmax, [h, t], which the backward reads."""
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    log_sums = _log_sums_like(queries)
    for begin, end, how in _documents(starts, mask, window):
        piece, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads(begin, end, queries, keys, values), **how
        )
        out[begin:end] = piece[0].transpose(0, 1)
        log_sums[:, begin:end] = log_sum[0]
    return out, log_sums


@torch.library.register_fake("kdtune::attend_within")
def _(queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries, memory_format=torch.contiguous_format), _log_sums_like(queries)


@torch.library.impl("kdtune::attend_within_backward", "CPU")
def _attend_within_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    log_sums: Tensor,
    starts: Tensor,
    mask: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (queries, keys, values)]
    for begin, end, how in _documents(starts, mask, window):
        heads = _heads(begin, end, grad, queries, keys, values, out)
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, log_sums[None, :, begin:end], 0.0, **how
        )
        for whole, piece in zip(grads, pieces, strict=True):
            whole[begin:end] = piece[0].transpose(0, 1)
    return grads[0], grads[1], grads[2]


@torch.library.register_fake("kdtune::attend_within_backward")
def _(grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (queries, keys, values))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *heads, starts, mask, ctx.window = inputs
    ctx.save_for_backward(*heads, *output, starts, mask)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.kdtune.attend_within_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window)
    return *grads, None, None, None


torch.library.register_autograd("kdtune::attend_within", _differentiate, setup_context=_keep)


def _documents(starts: Tensor, mask: Tensor | None, window: int | None) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Where each begins and ends, and how its tokens see each other."""
    for begin, end in pairwise(starts.tolist()):
        length = end - begin
        if mask is None or window is None or window >= length:
            yield begin, end, {"is_causal": True}
        else:
            yield begin, end, {"is_causal": False, "attn_mask": mask[..., :length, :length]}


def _heads(begin: int, end: int, *tensors: Tensor) -> list[Tensor]:
    """Of one document, [1, h, l, n]."""
    return [x[begin:end].transpose(0, 1)[None] for x in tensors]


def _log_sums_like(queries: Tensor) -> Tensor:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return queries.new_empty(queries.size(1), queries.size(0), dtype=dtype)
