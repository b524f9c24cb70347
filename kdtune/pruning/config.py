"""How much of a model is to be left, and the `config.json` of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from kdtune.config import setting
from kdtune.models import ModelConfig, from_hf_config

LayerImportance = Literal["cosine", "perplexity"]
Aggregation = Literal["mean", "l2"]


@dataclass
class DepthConfig:
    """Which layers stay."""

    keep_layers: list[int] | None = None  # these, in increasing order; null: see num_layers
    num_layers: int | None = setting(None, gt=0)  # this many, those that count most on the text; null: all
    # cosine: how far a layer turns its input; perplexity: rise of the cross-entropy without it; null: cosine
    importance: LayerImportance | None = None
    contiguous: bool = False  # leave out one block of layers, judged as a whole; false: each layer is judged alone


@dataclass
class WidthConfig:
    """How wide the layers stay."""

    hidden_size: int | None = setting(None, gt=0)  # channels of the hidden states, the same in all layers; null: all
    intermediate_size: int | None = setting(None, gt=0)  # channels of the MLP, of each layer its own; null: all
    num_heads: int | None = setting(None, gt=0)  # query heads, of each layer its own; null: those of the kept key heads
    num_kv_heads: int | None = setting(None, gt=0)  # key heads, with their query heads; null: those of the query heads
    # score of a channel or head over tokens: mean of magnitudes, or l2: root of the mean square; null: l2
    aggregation: Aggregation | None = None

    @property
    def is_given(self) -> bool:
        """Whether anything is to become narrower."""
        return any(getattr(self, field.name) is not None for field in fields(self) if field.name != "aggregation")


def check_depth(cfg: DepthConfig, model: ModelConfig) -> None:
    """Refuse settings that exclude each other or leave out nothing; `select_layers` checks a list of layers.

    Raises:
        ValueError: says which, and what to do.
    """
    if cfg.keep_layers is not None and cfg.num_layers is not None:
        raise ValueError(
            f"depth.keep_layers={cfg.keep_layers} says which layers stay, and depth.num_layers={cfg.num_layers} has "
            "them chosen. Leave one of them out."
        )
    if cfg.num_layers is None and (cfg.importance or cfg.contiguous):
        setting = "depth.contiguous=true" if cfg.contiguous else f"depth.importance={cfg.importance}"
        why = "no layer is left out" if cfg.keep_layers is None else "depth.keep_layers has chosen"
        raise ValueError(
            f"{setting} is about how layers are chosen, and {why}. Give depth.num_layers, or leave it out."
        )
    kept = cfg.num_layers if cfg.keep_layers is None else len(cfg.keep_layers)
    if kept is not None and kept >= model.num_layers:
        setting = "num_layers" if cfg.keep_layers is None else "keep_layers"
        raise ValueError(
            f"depth.{setting}={getattr(cfg, setting)} leaves out no layer: the model has {model.num_layers}. Keep "
            "fewer, or leave it out."
        )
    if cfg.contiguous and block_size(cfg, model) == 1:
        raise ValueError(
            f"depth.num_layers={cfg.num_layers} leaves out one layer, which is a block by itself: "
            "depth.contiguous=true changes nothing. Leave it out."
        )


def block_size(cfg: DepthConfig, model: ModelConfig) -> int:
    """How many layers that follow each other are judged together."""
    return model.num_layers - cfg.num_layers if cfg.contiguous and cfg.num_layers is not None else 1


def narrow(config: Mapping[str, Any], cfg: WidthConfig) -> dict[str, Any]:
    """The `config.json` of a narrower model of the same family.

    Raises:
        ValueError: a size that is not smaller, or does not go with the others.
    """
    config = dict(config)
    if not cfg.is_given:
        if cfg.aggregation is not None:
            raise ValueError(
                f"width.aggregation={cfg.aggregation} is about how channels and heads are chosen, and all of them "
                "stay. Give a size of width, or leave it out."
            )
        return config
    model = from_hf_config(config)
    for name, size in (("hidden_size", model.hidden_size), ("intermediate_size", model.intermediate_size)):
        if (wanted := getattr(cfg, name)) is None:
            continue
        _check_smaller(name, wanted, size)
        config[name] = wanted
    if cfg.num_heads is not None or cfg.num_kv_heads is not None:
        config["num_attention_heads"], config["num_key_value_heads"] = _heads(cfg, model)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config["model_type"] == "llama" and width % heads:
        raise ValueError(
            f"A hidden size of {width} is not a multiple of {heads} heads, and transformers opens no llama of such "
            "sizes. Choose width.hidden_size and width.num_heads so that one divides the other."
        )
    if config.get("head_dim") is not None or model.head_dim * heads != width:
        config["head_dim"] = model.head_dim
    return config


def _heads(cfg: WidthConfig, model: ModelConfig) -> tuple[int, int]:
    """Query heads and key heads that are left."""
    of_one = model.num_heads // model.num_kv_heads
    key_heads, heads = cfg.num_kv_heads, cfg.num_heads
    if heads is None:
        assert key_heads is not None
        _check_smaller("num_kv_heads", key_heads, model.num_kv_heads)
        heads = key_heads * of_one
    elif key_heads is None:
        if heads % of_one:
            raise ValueError(
                f"width.num_heads={heads}: {of_one} query heads share a key head, and go with it. Take a multiple of "
                f"{of_one}, or give width.num_kv_heads={model.num_kv_heads} to leave each key head fewer of them."
            )
        key_heads = heads // of_one
    elif heads % key_heads or heads // key_heads > of_one:
        raise ValueError(
            f"width.num_heads={heads} with width.num_kv_heads={key_heads}: each key head is left the same number of "
            f"query heads, at most the {of_one} that it has. Take a multiple of {key_heads}, "
            f"up to {key_heads * of_one}."
        )
    if key_heads > model.num_kv_heads:
        _check_smaller("num_kv_heads", key_heads, model.num_kv_heads)
    _check_smaller("num_heads", heads, model.num_heads)
    return heads, key_heads


def _check_smaller(name: str, wanted: int, size: int) -> None:
    if wanted >= size:
        raise ValueError(f"width.{name}={wanted} leaves out nothing: the model has {size}. Take less, or leave it out.")
