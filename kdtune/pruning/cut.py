"""The smaller model: the weights that are left of a bigger one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdtune.models import Decoder, ModelConfig

# What the rows and the columns of each weight belong to; a bias has rows alone.
_PARTS = {
    "embed_tokens": ("vocabulary", "hidden"),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("key_heads", "hidden"),
    "v_proj": ("key_heads", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("mlp", "hidden"),
    "up_proj": ("mlp", "hidden"),
    "down_proj": ("hidden", "mlp"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "norm": ("hidden",),
    "lm_head": ("vocabulary", "hidden"),
}


@dataclass(frozen=True)
class Kept:
    """What stays of a model, as increasing indices; None is all.

    Attributes:
        layers: of the whole model.
        hidden: [d] channels of the hidden states.
        mlp: [layers, channels] of each layer of the whole model.
        heads: [layers, heads] query heads of each; of every key head that has one of them as many.
        norm_scales: by name of a norm of the whole model, what its weight is multiplied by; empty: nothing is.
    """

    layers: list[int]
    hidden: Tensor | None = None
    mlp: Tensor | None = None
    heads: Tensor | None = None
    norm_scales: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def prune(model: Decoder, config: ModelConfig, kept: Kept) -> Decoder:
    """A model of what stays of another. Weights of which all stays are shared with it, others are copies.

    Args:
        model: the whole one, as it was loaded: no adapter, no weights of few bits.
        config: of the smaller one.
        kept: what stays, in the sizes of `config`.
    """
    with torch.device("meta"):
        pruned = Decoder(config)
    weights = dict(model.named_parameters())
    cut = {}
    for name, parameter in pruned.named_parameters():
        source, layer = _source(name, kept.layers)
        module = source.rpartition(".")[0]
        weight = weights[source].detach()
        for dim, part in enumerate(_PARTS[module.rpartition(".")[2]][: weight.dim()]):
            if (index := _index(part, kept, layer, model.config)) is not None:
                weight = weight.index_select(dim, index.to(weight.device))
        if (scale := kept.norm_scales.get(module)) is not None:
            weight = weight * scale
        assert weight.shape == parameter.shape, f"{name}: {weight.shape} is not {parameter.shape}"
        cut[name] = weight
    if config.tie_embeddings:
        cut["lm_head.weight"] = cut["model.embed_tokens.weight"]
    pruned.load_state_dict(cut, assign=True)
    if config.tie_embeddings:
        pruned.lm_head.weight = pruned.model.embed_tokens.weight
    return pruned.train(model.training)


def _source(name: str, layers: list[int]) -> tuple[str, int]:
    """The name in the whole model of a parameter of the smaller one, and the layer there; 0 of what is in none."""
    parts = name.split(".")
    if parts[1] != "layers":
        return name, 0
    layer = layers[int(parts[2])]
    return ".".join([*parts[:2], str(layer), *parts[3:]]), layer


def _index(part: str, kept: Kept, layer: int, config: ModelConfig) -> Tensor | None:
    """Rows or columns that stay; None: all."""
    if part == "hidden":
        return kept.hidden
    if part == "mlp" and kept.mlp is not None:
        return kept.mlp[layer]
    if part in ("heads", "key_heads") and kept.heads is not None:
        heads = kept.heads[layer]
        if part == "key_heads":
            heads = (heads // (config.num_heads // config.num_kv_heads)).unique()
        return (heads[:, None] * config.head_dim + torch.arange(config.head_dim, device=heads.device)).flatten()
    return None
