"""Attention, and which tokens a token sees."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, as one sequence of them: what is behind each other in a row, row behind row.

    A document is a run of equal ids in a row, padding too. Each is attended to by itself, so that its result is the one
    it has alone, and that neither the work nor the memory for a whole row's square is spent on it.

    Attributes:
        starts: [n + 1] int32, on the batch's device: where each begins among the b * s tokens, and the end.
        lengths: tokens of each.
        row_length: s, which no document is longer than.
    """

    starts: Tensor
    lengths: list[int]
    row_length: int
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: Tensor) -> Documents:
        """From `documents` [b, s] of a batch. On CUDA it waits for the device, once per forward."""
        is_start = torch.ones_like(ids, dtype=torch.bool)
        is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = F.pad(is_start.flatten().nonzero().flatten(), (0, 1), value=ids.numel())
        return cls(starts.int(), starts.diff().tolist(), ids.size(1))

    def positions(self) -> Tensor:
        """[b, s] int64, counted from 0 in each document."""
        index = torch.arange(int(self.starts[-1]), device=self.starts.device)
        return (index - self._spread(self.starts[:-1])).view(-1, self.row_length)

    def lengths_of_tokens(self) -> Tensor:
        """[b, s] int64: how long the document of each token is."""
        return self._spread(self.starts.diff()).view(-1, self.row_length)

    def _spread(self, values: Tensor) -> Tensor:
        return values.long().repeat_interleave(self.starts.diff(), output_size=sum(self.lengths))

    def window_mask(self, length: int, window: int, like: Tensor) -> Tensor | None:
        """The mask of a document, made once for all layers."""
        if window >= length:
            return None
        if (length, window) not in self._masks:
            index = torch.arange(length, device=like.device)[None]
            mask = attention_mask(index, index, window, causal=True, dtype=like.dtype)
            assert mask is not None
            self._masks[length, window] = mask
        return self._masks[length, window]


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, sight: Documents | Tensor | None, window: int | None
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        queries: [b, h, q, n].
        keys: [b, h_kv, k, n], where h_kv divides h.
        values: [b, h_kv, k, n].
        sight: documents that see only themselves; or a mask to be added, which holds the window already; None: plain
            causal.
        window: how far back a query sees among documents, itself included; None: to the start.

    Returns:
        [b, h, q, n].
    """
    if isinstance(sight, Documents):
        return _attend_within(queries, keys, values, sight, window)
    # On CUDA, kernels that take fewer key heads know no mask and no float32; what then remains holds [b, h, s, s]
    # (torch 2.13). Repeated heads open the memory-efficient kernel again.
    native = sight is None and (queries.dtype in (torch.bfloat16, torch.float16) or not queries.is_cuda)
    group_size = queries.size(1) // keys.size(1)  # query heads that share a key head
    if not native and group_size > 1:
        keys, values = (heads.repeat_interleave(group_size, dim=1) for heads in (keys, values))
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=sight, is_causal=sight is None, enable_gqa=native and group_size > 1
    )


def _attend_within(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, window: int | None) -> Tensor:
    b, s = queries.size(0), queries.size(2)
    queries, keys, values = (heads.transpose(1, 2).flatten(0, 1) for heads in (queries, keys, values))  # [b * s, h, n]
    if has_varlen_kernel(queries):
        out = _varlen(queries, keys, values, documents, window)
    else:
        outs = []
        for pieces in zip(*(heads.split(documents.lengths) for heads in (queries, keys, values)), strict=True):
            one = [piece.transpose(0, 1)[None] for piece in pieces]  # [1, h, length, n]
            mask = None if window is None else documents.window_mask(len(pieces[0]), window, queries)
            outs.append(attend(one[0], one[1], one[2], mask, None)[0].transpose(0, 1))
        out = torch.cat(outs)  # [b * s, h, n]
    return out.unflatten(0, (b, s)).transpose(1, 2)


def has_varlen_kernel(queries: Tensor) -> bool:
    """Whether torch's kernel for documents of any length, which is FlashAttention 2, takes these heads."""
    return (
        queries.is_cuda
        and torch.version.hip is None
        and queries.dtype in (torch.bfloat16, torch.float16)
        and queries.size(-1) % 8 == 0
        and queries.size(-1) <= 256
        and torch.cuda.get_device_capability(queries.device) >= (8, 0)
    )


def _varlen(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {}
    if queries.size(1) != keys.size(1):
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            settings["enable_gqa"] = True
        else:  # torch 2.11
            repeats = queries.size(1) // keys.size(1)
            keys, values = (heads.repeat_interleave(repeats, dim=1) for heads in (keys, values))
    starts, longest = documents.starts, max(documents.lengths)
    # Its window counts the tokens before the query, ours the query too.
    back = -1 if window is None else window - 1
    out = varlen_attn(queries, keys, values, starts, starts, longest, longest, window_size=(back, 0), **settings)
    assert isinstance(out, Tensor)  # and not a pair, which other settings ask for
    return out


def attention_mask(
    queries: Tensor, keys: Tensor, window: int | None, *, causal: bool, dtype: torch.dtype
) -> Tensor | None:
    """Which key each query may see, as a mask to be added to the scores.

    Not as booleans: of those, torch 2.13 makes such a mask in every layer and keeps each for the backward.

    Args:
        queries: [b, q] or [1, q], index of each query in its row.
        keys: [1, k], index of each key.
        window: how far back a query sees, itself included.
        causal: queries and keys are the same tokens, so that None can stand for the plain causal mask.
        dtype: of the queries.

    Returns:
        [b, 1, q, k] or [1, 1, q, k], 0 where a query may look and minus infinity where not; every query sees itself.
        None: plain causal.
    """
    if window is not None and window >= keys.size(1):
        window = None
    if causal and window is None:
        return None
    distance = queries[:, :, None] - keys[:, None, :]  # [b, q, k]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None]
