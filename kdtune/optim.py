"""The optimizer and the schedule of its learning rate."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

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


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in the fused form (one kernel for all parameters).

    Its `load_state_dict` takes the moments of a checkpoint and keeps the settings of `cfg`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    optimizer.register_load_state_dict_pre_hook(_with_own_settings)
    return optimizer


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


def _with_own_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    kept = [{**saved, **own, "params": saved["params"]} for saved, own in groups]
    return {**state, "param_groups": kept}
