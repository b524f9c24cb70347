"""From a float32 value to a bf16 weight: with the rest kept, or by chance.

A bf16 number is the upper half of the bits of a float32 one. Seen as integers, bits grow with the size of the number,
so that rounding is an addition and a shift, and a carry into the exponent is right, too.
"""

import torch
from torch import Tensor

# The largest bits to which a half can be added without touching the sign: GPUs write NaN as 0x7FFFFFFF.
_LARGEST = 0x7FFF7FFF


def widen(tensor: Tensor) -> Tensor:
    """The same numbers in float32; the tensor itself if it has as many bits or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """The float32 values of which `split` made these two: bf16 weights and int16 rests of one shape."""
    bits = weight.view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(rest).view(torch.float32)


def split(value: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Write float32 values as the nearest bf16 weights, and what those leave out as a signed rest.

        bits(value) = 2^16 bits(weight) + rest,  -2^15 <= rest < 2^15

    Nothing is lost. This is the split of Kalamkar et al. 2020, arXiv:2005.04680, "Optimizing Deep Learning Recommender
    Systems Training on CPU Cluster Architectures", with weights that are rounded instead of cut off. A value half way
    between two weights goes to the one farther from 0: with ties to even, as torch rounds, the rest would need a 17th
    bit.
    """
    bits = value.view(torch.int32).clamp(max=_LARGEST)
    rest.copy_(bits)  # the conversion keeps the lower 16 bits, whose first one is then the sign
    weight.view(torch.int16).copy_(bits.add_(2**15).bitwise_right_shift_(16))


def round_stochastically(value: Tensor, weight: Tensor, generator: torch.Generator | None) -> None:
    """Write float32 values as one of the two bf16 numbers around each, such that the mean is the value.

    The farther one from 0 is taken with the probability that the bits left out are of a whole step.
    """
    noise = torch.randint(0, 2**16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = value.view(torch.int32).clamp(max=_LARGEST - 2**15)
    weight.view(torch.int16).copy_(noise.add_(bits).bitwise_right_shift_(16))
