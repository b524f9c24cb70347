"""Four-bit integers, two in a byte, on any device: what torchao has is one layout per kernel.

Its kernels are made for the few tokens of generation. A teacher reads thousands at a time, and there they lose to
unpacking the weight first: 3 times slower than bf16 on a CPU (70 times in float32, 512 tokens, torchao 0.18), 6 to 13
times on a GPU (pytorch/ao issue 3496). They have no gradient either, which an adapter's training needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine
from torchao.utils import TorchAOBaseTensor

GROUP = 32  # neighbours in a row that share scale and zero point


class Int4Tensor(TorchAOBaseTensor):
    """A weight [n, d] as scale * (code - zero point), codes 0 to 15; asymmetric, 4.75 bits each with their share.

    Attributes:
        codes: [n, d / 2] uint8, the even column in the upper half.
        scale: [n, d / GROUP] bfloat16.
        zero_point: [n, d / GROUP] int8.
    """

    tensor_data_names = ["codes", "scale", "zero_point"]  # noqa: RUF012 (torchao copies the lists)
    tensor_attribute_names = ["dtype"]  # noqa: RUF012

    def __new__(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Int4Tensor:
        shape = (codes.shape[0], 2 * codes.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes, self.scale, self.zero_point = codes, scale, zero_point

    @classmethod
    def of(cls, weight: Tensor) -> Int4Tensor:
        """Quantise a weight [n, d], d a multiple of GROUP."""
        scale, zero_point = choose_qparams_affine(
            weight,
            MappingType.ASYMMETRIC,
            (1, GROUP),
            torch.uint8,
            quant_min=0,
            quant_max=15,
            scale_dtype=torch.bfloat16,
            zero_point_dtype=torch.int8,
            keepdim=True,
        )
        # In float32: torchao multiplies by the inverse of the scale, which bf16 would round.
        codes = quantize_affine(weight, (1, GROUP), scale.float(), zero_point, torch.uint8, quant_min=0, quant_max=15)
        return cls(codes[:, ::2] << 4 | codes[:, 1::2], scale, zero_point, weight.dtype)

    def dequantize(self) -> Tensor:
        """[n, d], in the weight's dtype."""
        n, half = self.codes.shape
        weight = torch.empty(n, half, 2, dtype=self.dtype, device=self.codes.device)
        weight[..., 0], weight[..., 1] = self.codes >> 4, self.codes & 15
        groups = weight.view(n, -1, GROUP).sub_(self.zero_point[..., None]).mul_(self.scale[..., None])
        return groups.view(n, 2 * half)


torch.serialization.add_safe_globals([Int4Tensor])  # so that torch.load with weights_only reads it
