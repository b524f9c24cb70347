"""Bytes in words, and on the disk."""

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
    trained, dtype = num_parameters(model), devices.DTYPES[cfg.dtype]
    finished = trained * devices.DTYPES[cfg.save_dtype or cfg.dtype].itemsize
    if cfg.lora is not None:
        trained, dtype = sum(map(math.prod, trained_shapes(model, cfg.lora).values())), torch.float32
        finished = trained * dtype.itemsize + (finished if cfg.lora.save_merged else 0)
    checkpoint = int(trained * (dtype.itemsize + optim.bytes_per_weight(cfg.optimizer, dtype)))
    return finished + (2 * checkpoint if cfg.save_every_n_steps else 0)


def format_bytes(count: float) -> str:
    """1610612736 -> '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
