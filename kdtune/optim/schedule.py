"""The learning rate of each step."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kdtune.config import setting


@dataclass
class LRSchedulerConfig:
    """Warm-up, then the named decay; the step after the last would be at `min_lr_ratio`."""

    name: Literal["cosine", "linear", "constant"] = "cosine"  # shape of the decay
    num_warmup_steps: int = setting(100, ge=0)  # optimizer steps; 0 starts at the peak
    min_lr_ratio: float = setting(0.0, ge=0, le=1)  # share of the peak that the decay ends at; not with constant

    def __post_init__(self) -> None:
        if self.name == "constant" and self.min_lr_ratio != 0:
            raise ValueError(
                f"lr_scheduler.min_lr_ratio={self.min_lr_ratio} says where a decay ends, and "
                "lr_scheduler.name=constant has none. Leave it out, or choose cosine or linear."
            )


def lr_schedule(peak: float, cfg: LRSchedulerConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (from 1) of a run of `num_steps`.

    It depends on the step alone: there is no state to save, and a resumed run follows the settings it is given.
    """
    if num_steps <= cfg.num_warmup_steps:
        warnings.warn(
            f"lr_scheduler.num_warmup_steps={cfg.num_warmup_steps} in a run of {num_steps} steps: the learning rate "
            "never reaches optimizer.lr.",
            stacklevel=2,
        )

    def learning_rate(step: int) -> float:
        done = step - 1
        if done < cfg.num_warmup_steps:
            return peak * step / (cfg.num_warmup_steps + 1)
        if cfg.name == "constant":
            return peak
        progress = min(1.0, (done - cfg.num_warmup_steps) / max(1, num_steps - cfg.num_warmup_steps))
        shape = 1 - progress if cfg.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return peak * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape)

    return learning_rate


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
