"""Bytes in words, on the disk, and of what is saved."""

from __future__ import annotations

import math
from typing import Any

import torch

from kdtune import devices, optim
from kdtune.models import ModelConfig, num_parameters, trained_shapes


def disk(cfg: Any, model: ModelConfig) -> int:
    """Bytes on the disk at most: what the run ends with, and two checkpoints while the newer replaces the older.

    Args:
        cfg: a recipe's settings.
        model: the architecture of what is trained.
    """
    trained, dtype = _trained(cfg, model)
    finished = num_parameters(model) * devices.DTYPES[cfg.save_dtype or cfg.dtype].itemsize
    if cfg.lora is not None:
        finished = trained * dtype.itemsize + (finished if cfg.lora.save_merged else 0)
    return finished + (2 * checkpoint(cfg, model) if cfg.save_every_n_steps else 0)


def checkpoint(cfg: Any, model: ModelConfig) -> int:
    """Bytes of what changes in training: on the disk, or of a copy in memory."""
    trained, dtype = _trained(cfg, model)
    return int(trained * (dtype.itemsize + optim.bytes_per_weight(cfg.optimizer, dtype)))


def _trained(cfg: Any, model: ModelConfig) -> tuple[int, torch.dtype]:
    """How many numbers, and of which dtype."""
    if cfg.lora is None:
        return num_parameters(model), devices.DTYPES[cfg.dtype]
    return sum(map(math.prod, trained_shapes(model, cfg.lora).values())), torch.float32


def format_bytes(count: float) -> str:
    """1610612736 -> '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
