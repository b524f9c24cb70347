"""Quantisation-aware training: weights are rounded in each forward, so that training makes up for it.

The rounding passes the gradient through as if it were not there (Bengio et al. 2013, "Estimating or Propagating
Gradients Through Stochastic Neurons", arXiv:1308.3432, section 4). What is trained are the weights before it. With a
teacher this is what NVIDIA calls quantisation-aware distillation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kdtune.config import setting
from kdtune.models.config import ModelConfig
from kdtune.models.decoder import Decoder
from kdtune.models.quantization import quantized_shapes, quiet_torchao

GROUP_SIZE = 32


@dataclass
class QATConfig:
    """What the linear layers are rounded to in training, and in the model that comes out; head and embedding stay."""

    weights: Literal["int4", "int8"] = "int4"  # int4: a scale per group of neighbours in a row; int8: per row
    group_size: int | None = setting(None, gt=0)  # int4 weights that share a scale; null: 32
    activations: Literal["int8"] | None = None  # round what the layers are given, too, a scale per token; null: not

    def __str__(self) -> str:
        scales = "a scale per row" if self.weights == "int8" else f"a scale per {self.columns(0)}"
        return f"{self.weights} weights, {scales}" + f", {self.activations} activations" * (
            self.activations is not None
        )

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.weights == "int4" else 8

    def columns(self, d: int) -> int:
        """Of a weight [n, d], how many neighbours share a scale."""
        return d if self.weights == "int8" else self.group_size or GROUP_SIZE


def check_qat(cfg: QATConfig, config: ModelConfig, *, has_adapter: bool, dtype: str, save_dtype: str | None) -> None:
    """Refuse what a model's shapes do not allow, what would change nothing, and settings that exclude each other.

    Args:
        cfg: how weights are rounded.
        config: the model's architecture.
        has_adapter: an adapter is trained instead of the weights.
        dtype: of the weights in training, as the setting has it.
        save_dtype: of the finished model, likewise.

    Raises:
        ValueError: says what, and what to do.
    """
    if has_adapter:
        raise ValueError(
            "qat rounds the weights that are trained, and with lora those stay as they are; merged, they would be "
            "rounded for the first time. Leave one of them out, or merge an adapter first (checkpointer.adapter_dir)."
        )
    if save_dtype not in (None, dtype):
        raise ValueError(
            f"save_dtype={save_dtype} would round the scales of qat's integers, with which the model was trained in "
            f"{dtype}. Leave it out, or train with dtype={save_dtype}."
        )
    if cfg.weights == "int8" and cfg.group_size is not None:
        raise ValueError(
            f"qat.group_size={cfg.group_size} is about int4 weights, and with qat.weights=int8 a row has one scale. "
            "Leave it out."
        )
    for name, (n, d) in quantized_shapes(config).items():
        if d % 8 or d % cfg.columns(d):
            raise ValueError(
                f"qat: {name} is {n} x {d}, and its columns have to be a multiple of {max(8, cfg.columns(d))}. Choose "
                "another qat.group_size, or qat.weights=int8, which takes any multiple of 8."
            )


def prepare_qat(model: Decoder, cfg: QATConfig) -> None:
    """Replace the linear layers inside of a model's layers by ones that round; their parameters stay the same."""
    with quiet_torchao():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig as TorchaoConfig

        quantize_(model.model.layers, TorchaoConfig(_base_config(cfg), step="prepare"))
    model.model.is_rounded = True


def _base_config(cfg: QATConfig) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    dtype = getattr(torch, cfg.weights)
    granularity = PerGroup(cfg.group_size or GROUP_SIZE) if cfg.weights == "int4" else PerAxis(0)
    if cfg.activations is None:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)


def convert_qat(weight: Tensor, cfg: QATConfig) -> tuple[Tensor, Tensor]:
    """The integers [n, d] (int8) and scales [n, groups] that the forward rounds a weight [n, d] to."""
    with quiet_torchao():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    block = (1, cfg.columns(weight.shape[1]))
    converted = IntxUnpackedToInt8Tensor.from_hp(weight.detach(), block, getattr(torch, cfg.weights))
    return converted.qdata, converted.scale
