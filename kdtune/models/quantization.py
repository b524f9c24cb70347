"""Frozen weights in few bits: which kinds there are, what each needs, and the linear layer that computes with them.

Only the linear layers inside the decoder's layers are quantised. The embedding is looked up, not multiplied, and the
loss reads the head's weight in pieces: both stay as they are, which also keeps the last product, where errors become
errors of the logits at once, exact.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune.dtensors import is_spread
from kdtune.models.config import ModelConfig
from kdtune.models.decoder import parameter_shapes

# How a frozen linear layer is stored and multiplied.
#   int8          one scale per row                                          8.0 bits a weight
#   fp8           float8_e4m3, one scale per row                             8.0
#   int4          scale and zero point per 32 neighbours                     4.75
#   nf4           QLoRA's normal float, scales quantised too                 4.13
#   int8_dynamic  int8, and the activations as well, a scale per token       8.0
#   fp8_dynamic   fp8, and the activations as well, a scale per token        8.0
Quantization = Literal["int8", "int4", "nf4", "fp8", "int8_dynamic", "fp8_dynamic"]
DYNAMIC = ("int8_dynamic", "fp8_dynamic")

# Of what the sizes of a weight must be multiples: rows, columns, all of it.
_MULTIPLES = {
    "int4": (1, 32, 1),
    "nf4": (1, 1, 64 * 256),  # 64 weights share a scale, 256 scales theirs (torchao 0.18)
    "int8_dynamic": (8, 8, 1),
    "fp8_dynamic": (16, 16, 1),
}
# The oldest CUDA devices that multiply such numbers, and what they are called.
_CAPABILITY = {"int8_dynamic": ((8, 0), "A100, RTX 30"), "fp8_dynamic": ((8, 9), "RTX 40, H100")}
_LAYER_WEIGHT = re.compile(r"model\.layers\.\d+\.\w+\.\w+\.weight")


def quantized_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the weights that are quantised: those of the linear layers inside the decoder's layers."""
    shapes = parameter_shapes(config).items()
    return {name: shape for name, shape in shapes if len(shape) == 2 and _LAYER_WEIGHT.fullmatch(name)}


def check_quantization(
    kind: Quantization,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    setting: str,
    needs_gradient: bool = False,
) -> None:
    """Refuse a kind that this device, this dtype or the shapes of this model do not allow.

    Args:
        kind: how the weights will be stored.
        config: the model's architecture.
        dtype: of its weights before, and of its activations.
        device: where it will be; `meta` stands for any accelerator.
        setting: the setting that asks for it, to name it.
        needs_gradient: something before or beside the frozen layers is trained.

    Raises:
        ValueError: what is needed, and what to take instead.
    """
    asked = f"{setting}={kind}"
    weight_only = kind.removesuffix("_dynamic")
    if kind in DYNAMIC and needs_gradient:
        raise ValueError(
            f"{asked} rounds the activations, through which no gradient comes back. Use {weight_only}, which rounds "
            "the weights alone."
        )
    if device.type == "mps" and kind.startswith("fp8"):
        raise ValueError(f"{asked}: {device} has no 8-bit floating point numbers. Use int8.")
    if kind == "fp8_dynamic" and device.type == "cpu":
        raise ValueError(
            f"{asked} multiplies 8-bit floating point numbers, which CPUs do not (GPUs do from compute capability 8.9 "
            f"on). Use {weight_only}: the same weights, multiplied in {dtype}."
        )
    if kind == "fp8_dynamic" and dtype != torch.bfloat16:
        raise ValueError(f"{asked} multiplies into bf16, and the model is in {dtype}. Use bf16, or {weight_only}.")
    if kind in _CAPABILITY and device.type == "cuda":
        needed, names = _CAPABILITY[kind]
        found = torch.cuda.get_device_capability(device)
        if found < needed:
            raise ValueError(
                f"{asked} needs a GPU of compute capability {needed[0]}.{needed[1]} ({names}) or newer, and {device} "
                f"has {found[0]}.{found[1]}. Use {weight_only}: the same weights, multiplied in {dtype}."
            )
    rows, columns, whole = _MULTIPLES.get(kind, (1, 1, 1))
    for name, (n, d) in quantized_shapes(config).items():
        if n % rows or d % columns or n * d % whole:
            wanted = [f"{rows} rows"] * (rows > 1) + [f"{columns} columns"] * (columns > 1)
            wanted += [f"{whole} weights"] * (whole > 1)
            raise ValueError(
                f"{asked} takes weights with a multiple of {' and '.join(wanted)}, and {name} is {n} x {d}. "
                "Use int8, which takes any."
            )


def quantize(weight: Tensor, kind: Quantization) -> Tensor:
    """A weight [n, d] as a tensor of torchao's, which holds few bits and behaves as the weight in `F.linear`.

    What it holds are the tensors that its `__tensor_flatten__` names. Works on `meta`, too.
    """
    with quiet_torchao():
        from torchao.quantization import Float8MMConfig, Float8Tensor, Int8Tensor, PerRow, to_nf4
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs
        from torchao.utils import should_reduce_range

        from kdtune.models.int4 import Int4Tensor

    weight = weight.detach()
    if kind == "int8":
        return Int8Tensor.from_hp(weight, PerRow())
    if kind == "int8_dynamic":
        narrow = should_reduce_range(weight.device)  # sums overflow on old CPUs otherwise
        activations = QuantizeTensorToInt8Kwargs(PerRow(), reduce_range=narrow)
        return Int8Tensor.from_hp(weight, PerRow(), act_quant_kwargs=activations, reduce_range=narrow)
    least = 1e-12  # of a row's absmax: without it (torchao 0.18) zeros become 0 / 0
    if kind == "fp8":
        return Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=least)
    if kind == "fp8_dynamic":
        products = Float8MMConfig(use_fast_accum=True)
        activations = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), mm_config=products, hp_value_lb=least)
        return Float8Tensor.from_hp(
            weight, granularity=PerRow(), hp_value_lb=least, mm_config=products, act_quant_kwargs=activations
        )
    if kind == "int4":
        return Int4Tensor.of(weight)
    return to_nf4(weight)


def stored_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight that was fp8 on the disk, as `quantize` would have made it.

    Args:
        codes: [n, d], float8_e4m3fn.
        scale: [n / rows, d / columns] of blocks, float32.
        dtype: that the weight is to be unpacked into.
    """
    with quiet_torchao():
        from torchao.quantization import Float8Tensor
    block = [size // count for size, count in zip(codes.shape, scale.shape, strict=True)]
    return Float8Tensor(codes, scale, block_size=block, dtype=dtype)


def dequantize(weight: Any) -> Tensor:
    """What a weight of `quantize` stands for, [n, d], in the dtype that it had.

    To the bit what torchao makes of it, with a third of the memory that is written on the way.
    """
    if hasattr(type(weight), "get_original_weight"):
        return _dequantize_nf4(weight)
    if "qdata" in type(weight).tensor_data_names and weight.scale.shape == (weight.shape[0], 1):  # int8, fp8
        return weight.qdata.to(weight.dtype).mul_(weight.scale)
    return weight.dequantize()


def _dequantize_nf4(weight: Any) -> Tensor:
    levels = weight.nf4
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # [256, 2], of each byte
    block = weight.scaler_block_size
    scales = weight.dequantize_scalers(weight.quantized_scalers, weight.quantization_factor, block)
    blocks = pairs[weight.quantized_data.int()].view(-1, weight.block_size)
    return blocks.mul_(scales[:, None]).view(weight.shape)


def num_bytes(weight: Any) -> int:
    """Bytes that a weight holds, quantised or not."""
    if not is_quantized(weight):
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight came from `quantize`."""
    # Of the weight itself, torch.compile says that it has not.
    return hasattr(type(weight), "__tensor_flatten__") and not is_spread(weight)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a frozen weight, quantised or not; gradients come back to `x`.

    A quantised weight is unpacked for each product. For the thousands of tokens of a training step that costs little,
    and the product runs at full speed; the `_dynamic` kinds multiply what is stored.
    """
    if not is_quantized(weight) or getattr(weight, "act_quant_kwargs", None) is not None:
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in few bits."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, which keeps the few bits for the backward and not the weight that they stand for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not saved_tensors, which offloading would move to the host
        return F.linear(x, dequantize(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ dequantize(ctx.weight), None, None


def quantize_linear(model: nn.Module, name: str, weight: Tensor, kind: Quantization) -> None:
    """Replace the linear layer `name` of a model, which may be on `meta`, by one that stores `weight` in few bits.

    A weight that is quantised already stays as it is.
    """
    weight = weight if is_quantized(weight) else quantize(weight, kind)
    owner, _, attribute = name.rpartition(".")
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    setattr(model.get_submodule(owner), attribute, QuantizedLinear(weight, linear.bias))


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Without what importing torchao logs about kernels for other machines, and compiling says of each class (0.18)."""
    warnings.filterwarnings("ignore", message=".*does not implement _stable_hash_for_caching")
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
