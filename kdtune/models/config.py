"""The switches that tell one decoder from another; `families.py` sets them from a checkpoint's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `rope.py` says what each type does with these."""

    type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0  # by how much the context was stretched; every type but default
    original_max_seq_len: int = 0  # tokens before stretching; dynamic, llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the range between beta_fast and beta_slow outwards
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `Decoder` needs to know of an architecture."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_dim: int  # not always hidden_size / num_heads
    max_seq_len: int  # tokens; what the checkpoint was made for, not enforced here
    windows: tuple[int | None, ...]  # one per layer: how many tokens back a token sees, itself included; None: all
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of queries and keys, before rope
    initializer_range: float = 0.02  # standard deviation of fresh weights

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}. "
                "Each key head serves the same number of query heads; correct config.json."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd. Rotary embedding turns pairs; correct config.json.")
        assert len(self.windows) == self.num_layers
