"""From a checkpoint's `config.json` to the decoder's switches: one entry per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from kdtune.models.config import ModelConfig, RopeConfig, RopeType
from kdtune.models.decoder import ACTIVATIONS
from kdtune.models.rope import yarn_attention_factor


@dataclass(frozen=True)
class Family:
    """What a `model_type` means beyond the keys that all families share."""

    defaults: Mapping[str, Any]  # for keys that its config.json may leave out, as transformers fills them in
    switches: Callable[[Mapping[str, Any]], dict[str, Any]]  # fields of ModelConfig


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = config["attention_bias"]
    return {"qkv_bias": bias, "attention_output_bias": bias, "mlp_bias": config["mlp_bias"]}


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config["sliding_window"]
    if window is not None and len(set(config.get("layer_types") or [])) > 1:
        raise ValueError(
            'config.json has model_type "mistral" and layers of different layer_types. Mistral slides every layer or '
            "none, so this is a model of another family, which kdtune does not have."
        )
    return {"windows": (window,) * config["num_hidden_layers"]}


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(config)}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = config["attention_bias"]
    return {"qkv_bias": bias, "attention_output_bias": bias, "qk_norm": True, "windows": _qwen_windows(config)}


def _qwen_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    num_layers = config["num_hidden_layers"]
    if not config["use_sliding_window"] or config["sliding_window"] is None:
        return (None,) * num_layers
    types = config.get("layer_types")
    if types is None:
        sliding = [index >= config["max_window_layers"] for index in range(num_layers)]
    else:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise ValueError(
                f"config.json has layer_types {types} for {num_layers} layers. "
                "It needs one of full_attention and sliding_attention for each layer."
            )
        sliding = [kind == "sliding_attention" for kind in types]
    return tuple(config["sliding_window"] if slides else None for slides in sliding)


_COMMON = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": None,
    "head_dim": None,
}
_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    # Llama 1 to 3.3, SmolLM2, TinyLlama and others that kept the architecture.
    "llama": Family({"max_position_embeddings": 2048}, _llama),
    "mistral": Family({"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}, _mistral),
    "qwen2": Family(_QWEN, _qwen2),  # Qwen 1.5, 2, 2.5
    "qwen3": Family({**_QWEN, "head_dim": 128}, _qwen3),
}


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """The switches of the decoder that a `config.json` describes, written by any version of transformers.

    Raises:
        ValueError: a family or a feature that kdtune does not have, or a key that is missing.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json has model_type {model_type!r}, which kdtune does not have. "
            f"It has: {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[model_type]
    config = {**_COMMON, **family.defaults, **config}
    _refuse_unsupported(config)
    num_heads = config["num_attention_heads"]
    switches: dict[str, Any] = {"windows": (None,) * config["num_hidden_layers"], **family.switches(config)}
    return ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config["num_key_value_heads"] or num_heads,
        head_dim=config["head_dim"] or config["hidden_size"] // num_heads,
        max_seq_len=config["max_position_embeddings"],
        rope=_rope(config),
        norm_eps=config["rms_norm_eps"],
        activation=config["hidden_act"],
        tie_embeddings=config["tie_word_embeddings"],
        initializer_range=config["initializer_range"],
        **switches,
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if config.get(key) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}, without which the model's size is unknown.")
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"config.json has hidden_act {config['hidden_act']!r}, which kdtune does not have. "
            f"It has: {', '.join(ACTIVATIONS)}."
        )
    if config["attention_dropout"]:
        raise ValueError(
            f"config.json has attention_dropout {config['attention_dropout']}. kdtune trains without dropout; "
            "set it to 0.0 in config.json to go on without it (outputs at evaluation are the same)."
        )


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = {**(config.get("rope_scaling") or config.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    supported = get_args(RopeType)
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if rope_type not in supported or partial != 1.0 or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"config.json asks for a rotary embedding that kdtune does not have: {rope}, partial_rotary_factor "
            f"{partial}. It has the types {', '.join(supported)} over whole heads, the same in every layer."
        )
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if rope_type == "default":
        return RopeConfig(theta=theta)

    max_seq_len = config["max_position_embeddings"]
    if rope_type == "dynamic":
        original = max_seq_len
    else:
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        original = original or max_seq_len
    factor = rope.get("factor") or (max_seq_len / original if rope_type == "yarn" else None)
    if factor is None:
        raise ValueError(f"config.json has a rotary embedding of type {rope_type} without its factor: {rope}.")
    settings: dict[str, Any] = {"type": rope_type, "factor": float(factor), "original_max_seq_len": original}
    if rope_type == "llama3":
        settings |= {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor") if key in rope}
    elif rope_type == "yarn":
        settings |= {key: float(rope[key]) for key in ("beta_fast", "beta_slow") if rope.get(key)}
        settings["truncate"] = rope.get("truncate", True)
        settings["attention_factor"] = rope.get("attention_factor")
        if settings["attention_factor"] is None:
            settings["attention_factor"] = yarn_attention_factor(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
    return RopeConfig(theta=theta, **settings)
