"""The optimizer and its schedule."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kdtune.config import setting


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization")."""

    lr: float = setting(2e-5, gt=0)  # peak learning rate
    weight_decay: float = setting(0.01, ge=0)  # on matrices; never on norms and biases
    beta1: float = setting(0.9, ge=0, lt=1)  # decay of the first moment
    beta2: float = setting(0.95, ge=0, lt=1)  # decay of the second moment
    eps: float = setting(1e-8, gt=0)  # added to the root of the second moment


@dataclass
class LRSchedulerConfig:
    """Warm-up from 0, then the named decay down to `min_lr_ratio` at the last step."""

    name: Literal["cosine", "linear", "constant"] = "cosine"  # shape of the decay
    num_warmup_steps: int = setting(100, ge=0)  # optimizer steps; 0 starts at the peak
    min_lr_ratio: float = setting(0.0, ge=0, le=1)  # share of the peak that is left at the end; not with constant

    def __post_init__(self) -> None:
        if self.name == "constant" and self.min_lr_ratio != 0:
            raise ValueError(
                f"lr_scheduler.min_lr_ratio={self.min_lr_ratio} says where a decay ends, and "
                "lr_scheduler.name=constant has none. Leave it out, or choose cosine or linear."
            )


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in the fused form (one kernel for all parameters)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, cfg: LRSchedulerConfig, num_steps: int) -> LambdaLR:
    """The schedule over a run of `num_steps` optimizer steps."""
    if num_steps <= cfg.num_warmup_steps:
        warnings.warn(
            f"lr_scheduler.num_warmup_steps={cfg.num_warmup_steps} in a run of {num_steps} steps: the learning rate "
            "never reaches optimizer.lr.",
            stacklevel=2,
        )
    return LambdaLR(optimizer, lambda step: lr_factor(step, cfg, num_steps))


def lr_factor(step: int, cfg: LRSchedulerConfig, num_steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): warm-up ends with 1 at step `num_warmup_steps`."""
    if step < cfg.num_warmup_steps:
        return (step + 1) / (cfg.num_warmup_steps + 1)
    if cfg.name == "constant":
        return 1.0
    progress = min(1.0, (step - cfg.num_warmup_steps) / max(1, num_steps - cfg.num_warmup_steps))
    shape = 1 - progress if cfg.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape
