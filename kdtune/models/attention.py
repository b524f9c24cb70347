"""Attention, and which tokens a token sees."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune.documents import Documents
from kdtune.models.varlen import attend_within


@dataclass(frozen=True)
class BlockCausal:
    """Documents that see only themselves, each of its tokens what is before it.

    Each is attended to by itself, so that its result is the one it has alone, and that neither the work nor the memory
    for a whole row's square is spent on it.

    Attributes:
        documents: of the batch.
        window: how far back a token sees, itself included; None: to the start of its document.
        mask: [1, 1, l, l] of the longest document, whose corner is the mask of a shorter one; None: `window` hides
            nothing, or is the kernel's to keep.
        longest: tokens of the longest document.
        kernel: what computes it: torch's kernel for documents of any length, the CPU's here, or one call a document.
    """

    documents: Documents
    window: int | None
    mask: Tensor | None
    longest: int
    kernel: Literal["torch", "cpu", "none"]

    def mask_of(self, length: int) -> Tensor | None:
        """For a document of this length."""
        if self.mask is None or self.window is None or self.window >= length:
            return None
        return self.mask[..., :length, :length]


Sight = BlockCausal | Tensor | None  # what tokens see, see `attend`


def block_causal(documents: Documents, window: int | None, like: Tensor, head_dim: int) -> BlockCausal:
    """What tokens of `documents` see in layers of this window, made once for all of them.

    Args:
        like: of the device and dtype of the heads.
        head_dim: their size.
    """
    kernel: Literal["torch", "cpu", "none"] = "cpu" if like.device.type == "cpu" else "none"
    if has_varlen_kernel(like, head_dim):
        kernel = "torch"
    mask = None
    if window is not None and window < documents.longest and kernel != "torch":
        index = torch.arange(documents.longest, device=like.device)[None]
        mask = attention_mask(index, index, window, causal=True, dtype=like.dtype)
    return BlockCausal(documents, window, mask, documents.longest, kernel)


def attend(queries: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> Tensor:
    """Scaled dot-product attention.

    Args:
        queries: [b, h, q, n].
        keys: [b, h_kv, k, n], where h_kv divides h.
        values: [b, h_kv, k, n].
        sight: documents that see only themselves; or a mask to be added; None: plain causal.

    Returns:
        [b, h, q, n].
    """
    if isinstance(sight, BlockCausal):
        return _attend_within(queries, keys, values, sight)
    # On CUDA, kernels that take fewer key heads know no mask and no float32; what then remains holds [b, h, s, s]
    # (torch 2.13). Repeated heads open the memory-efficient kernel again.
    is_gpu = queries.is_cuda or queries.is_meta  # in a plan, meta stands for a GPU
    native = sight is None and (queries.dtype in (torch.bfloat16, torch.float16) or not is_gpu)
    group_size = queries.size(1) // keys.size(1)  # query heads that share a key head
    enable_gqa = False
    if group_size > 1:  # of a model in FSDP, code is made for numbers of heads that it asks for (torch 2.13)
        enable_gqa = native
        if not native:
            keys, values = (heads.repeat_interleave(group_size, dim=1) for heads in (keys, values))
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=sight, is_causal=sight is None, enable_gqa=enable_gqa
    )


def _attend_within(queries: Tensor, keys: Tensor, values: Tensor, sight: BlockCausal) -> Tensor:
    b, s = queries.size(0), queries.size(2)
    queries, keys, values = (heads.transpose(1, 2).flatten(0, 1) for heads in (queries, keys, values))  # [b * s, h, n]
    if sight.kernel == "torch":
        out = _varlen(queries, keys, values, sight)
    elif sight.kernel == "cpu":
        out = attend_within(queries, keys, values, sight.documents.starts, sight.mask, sight.window)
    else:
        outs = []
        for pieces in zip(*(heads.split(sight.documents.lengths) for heads in (queries, keys, values)), strict=True):
            one = [piece.transpose(0, 1)[None] for piece in pieces]  # [1, h, length, n]
            outs.append(attend(one[0], one[1], one[2], sight.mask_of(len(pieces[0])))[0].transpose(0, 1))
        out = torch.cat(outs)  # [b * s, h, n]
    return out.unflatten(0, (b, s)).transpose(1, 2)


def has_varlen_kernel(like: Tensor, head_dim: int) -> bool:
    """Whether torch's kernel for documents of any length, which is FlashAttention 2, takes heads of this size."""
    if like.dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    if like.is_meta:  # a plan, which is for such a device
        return True
    return like.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(like.device) >= (8, 0)


def _varlen(queries: Tensor, keys: Tensor, values: Tensor, sight: BlockCausal) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {}
    if queries.size(1) != keys.size(1):
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            settings["enable_gqa"] = True
        else:  # torch 2.11
            repeats = queries.size(1) // keys.size(1)
            keys, values = (heads.repeat_interleave(repeats, dim=1) for heads in (keys, values))
    starts, longest = sight.documents.starts, sight.longest
    # Its window counts the tokens before the query, ours the query too.
    back = -1 if sight.window is None else sight.window - 1
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
