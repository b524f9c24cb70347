"""Reading config.json: real ones, older and newer keys, and refusals."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdtune.models import from_hf_config, num_parameters

LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PLAIN = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def sizes(model_type: str, v: int, d: int, mlp: int, layers: int, heads: int, kv: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": v,
        "hidden_size": d,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": tied,
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # The counts are those of the published checkpoints.
        (sizes("llama", 128256, 2048, 8192, 16, 32, 8, True), 1_235_814_400),  # Llama 3.2 1B
        (sizes("llama", 128256, 4096, 14336, 32, 32, 8, False), 8_030_261_248),  # Llama 3.1 8B
        (sizes("llama", 32000, 4096, 11008, 32, 32, 32, False), 6_738_415_616),  # Llama 2 7B
        (sizes("llama", 49152, 576, 1536, 30, 9, 3, True), 134_515_008),  # SmolLM2 135M
        (sizes("qwen2", 151936, 896, 4864, 24, 14, 2, True), 494_032_768),  # Qwen 2 and 2.5 0.5B
        (sizes("qwen3", 151936, 1024, 3072, 28, 16, 8, True), 596_049_920),  # Qwen 3 0.6B: 16 heads of 128
        (sizes("mistral", 32000, 4096, 14336, 32, 32, 8, False), 7_241_732_096),  # Mistral 7B
    ],
)
def test_published_sizes(config: dict[str, Any], expected: int) -> None:
    assert num_parameters(from_hf_config(config)) == expected


def test_old_and_new_keys_say_the_same(variant: str, hf_folder: Callable[..., Path]) -> None:
    new = json.loads((hf_folder(variant) / "config.json").read_text())
    old = copy.deepcopy(new)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert from_hf_config(old) == from_hf_config(new)
    if old["rope_scaling"]:
        rope["type"] = rope.pop("rope_type")  # as before transformers 4.43
        assert from_hf_config(old) == from_hf_config(new)


def test_real_llama_3_2_rope() -> None:
    rope = from_hf_config(PLAIN | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING}).rope
    assert (rope.type, rope.theta, rope.factor, rope.original_max_seq_len) == ("llama3", 500000.0, 32.0, 8192)


def test_yarn_factor_can_be_left_to_the_lengths() -> None:
    scaling = {"type": "yarn", "original_max_position_embeddings": 16}
    assert from_hf_config(PLAIN | {"rope_scaling": scaling}).rope.factor == 4.0


def test_windows_of_each_family() -> None:
    assert from_hf_config(PLAIN | {"sliding_window": 8}).windows == (None,) * 4
    assert from_hf_config(PLAIN | {"model_type": "mistral", "sliding_window": 8}).windows == (8,) * 4
    assert from_hf_config(PLAIN | {"model_type": "mistral", "sliding_window": None}).windows == (None,) * 4
    qwen = PLAIN | {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert from_hf_config(qwen).windows == (None,) * 4
    assert from_hf_config(qwen | {"use_sliding_window": True}).windows == (None, None, None, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert', which kdtune does not have. It has: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None, "vocab_size": None}, "config.json lacks vocab_size, hidden_size"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_scaling": {"type": "longrope"}}, "rotary embedding that kdtune does not have"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary embedding that kdtune does not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "without its factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            "another family",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            "layer_types",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(PLAIN | changes)
