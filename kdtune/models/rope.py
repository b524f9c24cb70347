"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-rotated layout of Hugging Face weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtune.models.config import RopeConfig


class Rope:
    """Turns positions into the cosines and sines that rotate queries and keys.

    Not a module: as a buffer, the frequencies would be rounded by `model.to(torch.bfloat16)` and lost on `meta`.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.config = config
        self.head_dim = head_dim
        self.inv_freq = _inverse_frequencies(config, head_dim)  # [n / 2], float32 on the CPU
        self._on_device: dict[torch.device, Tensor] = {}  # a copy from the host waits for the device: once, not always

    def __call__(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines in float32.

        Args:
            positions: [b, s] or [1, s], int64, counted from 0 in each document.
            lengths: same shape: how long the document of each token is so far. Read by the dynamic type alone.

        Returns:
            (cos, sin), each [b, s, n]; the second half repeats the first.
        """
        if self.config.type == "dynamic":
            assert lengths is not None
            inv_freq = _dynamic_frequencies(self.config, self.head_dim, lengths)  # [b, s, n / 2]
        else:
            if positions.device not in self._on_device:
                self._on_device[positions.device] = self.inv_freq.to(positions.device)
            inv_freq = self._on_device[positions.device]
        angles = positions[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)  # [b, s, n]
        return angles.cos() * self.config.attention_factor, angles.sin() * self.config.attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [b, h, s, n] by angles whose cos and sin are [b, 1, s, n]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What yarn multiplies cos and sin by if config.json does not say (Peng et al. 2023, arXiv:2309.00071, eq. 22)."""

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _inverse_frequencies(config: RopeConfig, n: int) -> Tensor:
    # The CPU is named so that a model built under `torch.device("meta")` has them, and so that every device rotates
    # by the same float32 angles.
    exponents = torch.arange(0, n, 2, device="cpu").float() / n
    plain = 1.0 / config.theta**exponents
    if config.type == "linear":
        return plain / config.factor
    if config.type == "llama3":
        return _llama3_frequencies(config, plain)
    if config.type == "yarn":
        return _yarn_frequencies(config, n, plain)
    return plain


def _dynamic_frequencies(config: RopeConfig, n: int, lengths: Tensor) -> Tensor:
    """NTK-aware scaling whose base grows with the sequence once it is longer than the original context."""
    stretch = lengths[..., None].clamp(min=config.original_max_seq_len).float() / config.original_max_seq_len
    base = config.theta * (config.factor * stretch - (config.factor - 1)) ** (n / (n - 2))  # [b, s, 1]
    return 1.0 / base ** (torch.arange(0, n, 2, device=lengths.device).float() / n)


def _llama3_frequencies(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    turns = config.original_max_seq_len * plain / (2 * math.pi)  # in the original context
    kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / config.factor + kept * plain


def _yarn_frequencies(config: RopeConfig, n: int, plain: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): interpolate by how often a pair turns in the context."""

    def pair_with(turns: float) -> float:
        """The (fractional) index of the pair that turns this often in the original context."""
        return n * math.log(config.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(n // 2, device="cpu").float() - low) / width).clamp(0, 1)
    return stretched * plain / config.factor + (1 - stretched) * plain
