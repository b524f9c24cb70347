"""What kernels do and take that their arguments and results alone do not show: operations, and memory of their own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Of each product, which argument is its left factor.
PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::_int_mm": 0,
    "aten::_scaled_mm": 0,
    "aten::_weight_int8pack_mm": 0,
    "aten::_weight_int4pack_mm": 0,
    "aten::_weight_int4pack_mm_for_cpu": 0,
}

# Of each attention: how many products of the size of its scores it makes, and which argument are the queries. A
# backward makes the scores again.
_FLASH_BACKWARDS = ("aten::_scaled_dot_product_flash_attention_backward", "torch_attn::_varlen_attn_backward")
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention": (2, 0),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (2, 0),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (5, 1),
    "aten::_scaled_dot_product_efficient_attention": (2, 0),
    "aten::_scaled_dot_product_efficient_attention_backward": (5, 1),
    "torch_attn::_varlen_attn": (2, 0),
    "kdtune::attend_within": (2, 0),
    "kdtune::attend_within_backward": (5, 1),
    **dict.fromkeys(_FLASH_BACKWARDS, (5, 1)),
}


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Operations of a matrix product or of attention, two for each multiplication; 0 of anything else."""
    name = func._schema.name
    if name in PRODUCTS:
        return 2 * out.numel() * args[PRODUCTS[name]].size(-1)
    if name not in ATTENTION:
        return 0
    num_products, first = ATTENTION[name]
    queries, keys = args[first : first + 2]
    arguments = dict(zip(_argument_names(func), args, strict=False)) | kwargs
    if queries.dim() == 4:  # [b, h, s, n]
        length, is_causal = keys.size(-2), arguments.get("is_causal", False)
    elif "starts" in arguments:  # [t, h, n] of documents that are all of one length
        length, is_causal = keys.size(0) // (arguments["starts"].numel() - 1), arguments["mask"] is None
    else:
        length, is_causal = arguments["max_k"], arguments["window_size"][1] == 0
    seen = (length + 1) / 2 if is_causal else length  # of its keys by a query, on average
    if 0 <= (arguments.get("window_size") or (-1, 0))[0] < length:
        window = arguments["window_size"][0] + 1
        seen = window - window * (window - 1) / (2 * length)
    return int(2 * num_products * queries.numel() * seen)


def factor(func: Any, args: tuple[Any, ...]) -> Tensor:
    """The left factor of a product, or the queries of attention."""
    name = func._schema.name
    left: Tensor = args[PRODUCTS[name] if name in PRODUCTS else ATTENTION[name][1]]
    return left


def workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a kernel takes for itself on a GPU while it runs.

    FlashAttention 2 adds up the gradient of the queries in float32, and keeps those of keys and values for each query
    head before it adds them up for the head that they share (`mha_bwd` in torch's csrc/flash_attn/flash_api.cpp).
    """
    if func._schema.name not in _FLASH_BACKWARDS:
        return 0
    queries, keys = args[1:3]
    expanded = 2 * queries.nbytes if keys.numel() != queries.numel() else 0
    return 4 * queries.numel() + expanded


@functools.cache
def _argument_names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention on `meta`, as the kernels that a GPU would take: torch has none of them there, and
    would make [b, h, s, s] instead. The call is the same."""
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:2], query.size(-2), key.size(-2))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """F.rms_norm on `meta`, as the one kernel that it is on a GPU."""
    return aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]
