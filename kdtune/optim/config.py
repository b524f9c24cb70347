"""The optimizer's settings, and what they lead to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdtune.config import setting
from kdtune.models import Decoder, parameter_shapes
from kdtune.optim import moments
from kdtune.optim.adamw import AdamW, Precision


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization")."""

    name: moments.Name = "adamw"  # adamw_8bit, adamw_4bit, adamw_fp8: moments in codes of so many bits
    precision: Precision | None = None  # how bf16 weights take a step; null: fp32 with adamw, else stochastic
    offload: bool = False  # keep moments in host memory and compute the step there: slower, and none of them on the GPU
    lr: float = setting(2e-5, gt=0)  # peak learning rate
    weight_decay: float = setting(0.01, ge=0)  # on matrices; never on norms and biases
    beta1: float = setting(0.9, ge=0, lt=1)  # decay of the first moment
    beta2: float = setting(0.95, ge=0, lt=1)  # decay of the second moment
    eps: float = setting(1e-8, gt=0)  # added to the root of the second moment

    @property
    def resolved_precision(self) -> Precision:
        return self.precision or ("fp32" if self.name == "adamw" else "stochastic")


def check_optimizer(
    cfg: OptimizerConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    in_backward: bool,
    clip_grad_norm: float | None,
    gradient_accumulation_steps: int,
) -> None:
    """Refuse settings that exclude each other or change nothing.

    Raises:
        ValueError: says why, and what to do.
    """
    if dtype == torch.float32 and cfg.precision in ("stochastic", "nearest"):
        raise ValueError(
            f"optimizer.precision={cfg.precision} is about how bf16 weights are rounded after a step, and here float32 "
            "is trained: with dtype=fp32, or as an adapter of lora. Leave it out."
        )
    if cfg.offload and device.type == "cpu":
        raise ValueError(
            "optimizer.offload=true moves the optimizer's state from a GPU to the memory of its host, and device=cpu "
            "has no other memory. Leave it out; optimizer.name=adamw_8bit makes the state small."
        )
    if cfg.offload and cfg.name != "adamw":
        raise ValueError(
            f"optimizer.name={cfg.name} makes the state small where memory is short, and optimizer.offload=true keeps "
            "none of it there; the host would spend its time on codes. Choose one: optimizer.name=adamw to offload."
        )
    if in_backward and gradient_accumulation_steps > 1:
        raise ValueError(
            "optimizer_in_bwd=true takes the step within the backward of each micro-batch, and "
            f"gradient_accumulation_steps={gradient_accumulation_steps} asks for one step after several. Set "
            "gradient_accumulation_steps=1 (with a larger batch_size and enable_activation_checkpointing=true if need "
            "be), or leave optimizer_in_bwd out."
        )
    if in_backward and clip_grad_norm is not None:
        raise ValueError(
            f"clip_grad_norm={clip_grad_norm} shrinks the gradient by its norm, which is not known before its last "
            "part, and optimizer_in_bwd=true uses and frees each part at once. Set clip_grad_norm=null, or leave "
            "optimizer_in_bwd out."
        )


def build_optimizer(model: nn.Module, cfg: OptimizerConfig, *, seed: int = 0) -> AdamW:
    """AdamW over the trainable parameters of `model`.

    Its `load_state_dict` takes the moments of a checkpoint and keeps the settings of `cfg`.

    Args:
        model: its matrices are decayed, its norms and biases are not.
        cfg: the settings.
        seed: of stochastic rounding.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        groups,
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        name=cfg.name,
        precision=cfg.resolved_precision,
        offload=cfg.offload,
        seed=seed,
        **_among_stages(model),
    )


def _among_stages(model: nn.Module) -> dict[str, Any]:
    """Of a pipeline: where the parameters that are here are among those of the whole model."""
    if not isinstance(model, Decoder) or model.stage is None:
        return {}
    shapes = parameter_shapes(model.config)
    order = sorted(shapes, key=lambda name: len(shapes[name]) < 2)  # matrices first, as in the groups
    named = {parameter: model.in_checkpoint(name) for name, parameter in model.named_parameters()}
    return {
        "stage": model.stage,
        "numbers": {parameter: order.index(name) for parameter, name in named.items()},
        "twins": [model.head.weight] if model.config.tie_embeddings and model.stage.is_last else [],
    }


def accumulate_in_float32(model: nn.Module) -> None:
    """Let gradients of several backwards add up in float32, whatever the weights are in: 4 bytes for each weight.

    An addition in bf16 loses what is less than a 512th of the sum, and the more of them the more is lost.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)


def bytes_per_weight(cfg: OptimizerConfig, dtype: torch.dtype) -> float:
    """Of the optimizer's state, for weights of `dtype`."""
    has_rest = dtype == torch.bfloat16 and cfg.resolved_precision == "fp32"
    if cfg.name == "adamw":
        moment = 4.0 if has_rest else float(dtype.itemsize)
    else:
        moment = 1 / moments.CODES_PER_BYTE[cfg.name] + 4 / moments.BLOCK_SIZES[cfg.name]
    return 2 * moment + 2 * has_rest
