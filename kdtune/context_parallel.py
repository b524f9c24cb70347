"""Context parallel: the ranks of a group have the same rows, each a slice of their positions.

Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509. All of a layer but attention treats each position by itself.
Around attention, the ranks exchange heads for positions: each then has some heads of whole rows, so that documents,
windows and the kernels for them are those of one process, and all have the same work.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdtune.models import Decoder
from kdtune.models.attention import Sight, attend
from kdtune.models.decoder import Attention


def slice_rows(model: Decoder, group: dist.ProcessGroup) -> None:
    """Let a model take slices of rows from now on, of each rank of a group its own. All of them must call it then.

    With a cache, for generation, rows are whole, and each rank computes them by itself.

    Args:
        model: of which the heads of each layer can be dealt out (see `preflight.check_split`).
        group: of the ranks, in the order of the slices.
    """
    model.model.slice, model.model.num_slices = group.rank(), group.size()
    for attention in model.modules():
        if isinstance(attention, Attention):
            attention.attend = functools.partial(attend_in_slices, group=group)


def attend_in_slices(
    queries: Tensor, keys: Tensor, values: Tensor, sight: Sight, *, group: dist.ProcessGroup
) -> Tensor:
    """Attention of whole rows, of which each of n ranks has the s / n positions of a slice.

    Args:
        queries: [b, h, s / n, d], where n divides h.
        keys: [b, h_kv, s / n, d], where n divides h_kv, or h_kv divides n: then several ranks have the same key head.
        values: [b, h_kv, s / n, d].
        sight: of whole rows, see `attend`.
        group: of the ranks.

    Returns:
        [b, h, s / n, d].
    """
    n = group.size()
    if keys.size(1) < n:
        keys, values = (heads.repeat_interleave(n // keys.size(1), dim=1) for heads in (keys, values))
    # To rank r go the heads of its part, [b, s / n, h / n, d], which makes whole rows without a copy if b is 1.
    parts = [heads.unflatten(1, (n, -1)).permute(1, 0, 3, 2, 4) for heads in (queries, keys, values)]
    found = _exchange(torch.cat(parts, dim=3), group)  # [n, b, s / n, (h + 2 h_kv) / n, d]
    heads = found.transpose(0, 1).flatten(1, 2).transpose(1, 2)  # [b, (h + 2 h_kv) / n, s, d]
    queries, keys, values = heads.split([part.size(3) for part in parts], dim=1)
    out = attend(queries, keys, values, sight)  # [b, h / n, s, d]
    out = _exchange(out.transpose(1, 2).unflatten(1, (n, -1)).transpose(0, 1), group)  # [n, b, s / n, h / n, d]
    return out.permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What each of n ranks has for this one, [n, ...], where this one has `parts`, [n, ...], for them."""
    return _Exchange.apply(parts, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    found = torch.empty_like(parts)
    dist.all_to_all_single(found, parts, group=group)
    return found
