"""The two moments of AdamW in memory: as floats, or as codes of 8 or 4 bits in blocks that share a scale.

The formats are those of torchao.optim 0.18, with one difference: a second moment is never rounded to 0. There, a weight
whose gradient was small beside the others of its block, and is 0 now, takes a step of its first moment over eps.

* `adamw_8bit`: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.
* `adamw_4bit`: Li et al. 2023, "Memory Efficient Optimizers with 4-bit States", arXiv:2309.01507, with rows of 128.
* `adamw_fp8`: float8_e4m3fn.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdtune.optim.rounding import widen

Name = Literal["adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8"]

BLOCK_SIZES = {"adamw_8bit": 256, "adamw_4bit": 128, "adamw_fp8": 256}  # values that share a scale
CODES_PER_BYTE = {"adamw_8bit": 1, "adamw_4bit": 2, "adamw_fp8": 1}
SMALLEST = 4096  # values; a parameter of fewer has little to save and, as a norm or a bias, much to lose


def zeros(name: Name, parameter: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A moment of 0: its values or codes, and for codes the scale of each block.

    Args:
        name: the format.
        parameter: whose moment it is. One that is small or does not divide into blocks has float32 instead of codes.
        dtype: of `adamw`'s moment.
        device: where the moment is kept.
    """
    count = parameter.numel()
    if name == "adamw":
        return torch.zeros_like(parameter, dtype=dtype, device=device), None
    if count < SMALLEST or count % BLOCK_SIZES[name]:
        return torch.zeros_like(parameter, dtype=torch.float32, device=device), None
    codes = torch.float8_e4m3fn if name == "adamw_fp8" else torch.uint8
    moment = torch.zeros(count // CODES_PER_BYTE[name], dtype=codes, device=device)
    return moment, torch.zeros(count // BLOCK_SIZES[name], device=device)


def read(moment: Tensor, scale: Tensor | None, *, signed: bool) -> Tensor:
    """The moment in float32; one that has as many bits or more is given itself."""
    if scale is None:
        return widen(moment)
    if moment.dtype == torch.float8_e4m3fn:
        decoded = moment.float()
    else:
        packed = _is_packed(moment, scale)
        codes = torch.stack([moment >> 4, moment & 15], dim=-1).view(-1) if packed else moment
        decoded = table(4 if packed else 8, signed, moment.device).values.index_select(0, codes.int())
    return (decoded.view(len(scale), -1) * scale[:, None]).view(-1)


def write(
    value: Tensor, moment: Tensor, scale: Tensor | None, *, signed: bool, rounding: Callable[[Tensor, Tensor], object]
) -> None:
    """Change the moment to `value`, which it is or which `read` made of it; floats by `rounding(value, moment)`."""
    if scale is None:
        if moment.dtype != value.dtype:
            rounding(value, moment)
        return
    blocks = value.view(len(scale), -1)
    scale.copy_(blocks.abs().amax(dim=1).clamp_(min=1e-12))
    if moment.dtype == torch.float8_e4m3fn:
        scale /= torch.finfo(moment.dtype).max
        moment.copy_((blocks / scale[:, None]).view(-1))
    else:
        packed = _is_packed(moment, scale)
        codes = table(4 if packed else 8, signed, moment.device).nearest((blocks / scale[:, None]).view(-1))
        moment.copy_(codes[::2] << 4 | codes[1::2] if packed else codes)
    if not signed and not _is_packed(moment, scale):
        moment.view(torch.uint8).clamp_(min=1)  # in both formats code 0 is the value 0, and code 1 the next one


def assign(moment: Tensor, scale: Tensor | None, saved: Tensor, saved_scale: Tensor | None, *, signed: bool) -> None:
    """Change the moment to a saved one, converted if that has another format."""
    if moment.dtype == saved.dtype and moment.numel() == saved.numel():
        moment.copy_(saved.view_as(moment))
        if scale is not None and saved_scale is not None:
            scale.copy_(saved_scale)
        return
    value = read(saved, saved_scale, signed=signed).to(moment.device)
    if scale is None:
        moment.copy_(value.view_as(moment))
    else:
        write(value, moment, scale, signed=signed, rounding=Tensor.copy_)


def _is_packed(moment: Tensor, scale: Tensor) -> bool:
    return len(moment) == len(scale) * BLOCK_SIZES["adamw_4bit"] // 2


class _Table(NamedTuple):
    """What the codes of a format stand for, and what finds the nearest one without a search."""

    values: Tensor  # of each code, ascending
    middles: Tensor  # between each value and the next; infinity after the last
    lowest: Tensor  # by the upper half of a float32's bits, the code of the lowest number that has these

    def nearest(self, value: Tensor) -> Tensor:
        # No two middles are so close that numbers between them have the same upper half.
        upper = (value.view(torch.int32) >> 16).bitwise_and_(2**16 - 1)
        codes = self.lowest.index_select(0, upper)
        return codes + (value >= self.middles.index_select(0, codes))


@functools.cache
def table(bits: int, signed: bool, device: torch.device) -> _Table:
    """What a moment's codes stand for. Made once for a device, where it then stays."""
    if bits == 4 and not signed:
        values = torch.linspace(0, 1, 17)[1:]
    else:
        values = _dynamic_values(bits - 1, 7 if bits == 8 else 3, signed)
    middles = (values[1:] + values[:-1]) / 2
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    smallest = torch.where(upper < 0, upper | (2**16 - 1), upper).view(torch.float32)
    lowest = torch.bucketize(smallest, middles, out_int32=True, right=True)
    return _Table(*(tensor.to(device) for tensor in (values, torch.cat([middles, torch.tensor([torch.inf])]), lowest)))


def _dynamic_values(bits: int, exponents: int, signed: bool) -> Tensor:
    """Powers of ten with as many equal parts between them as their code leaves bits (Dettmers 2016, arXiv:1511.04561).

    Args:
        bits: of a code, without its sign.
        exponents: how many powers of ten there are.
        signed: whether half of the codes stand for negative values.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for exponent in range(exponents):
        parts = 2 ** (exponent + bits - exponents) * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, parts + 1)
        centres = 10.0 ** (exponent + 1 - exponents) * (edges[1:] + edges[:-1]) / 2
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values
