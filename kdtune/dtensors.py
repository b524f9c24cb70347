"""Tensors of which each process holds a part: `torch.distributed.tensor.DTensor`. A plain tensor is held whole."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """What this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> slice:
    """Which rows this process holds."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offsets[0], offsets[0] + shape[0])


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """The tensor that lies over the processes as `tensor` does, and of which this one holds `part`."""
    if not isinstance(tensor, DTensor):
        return part
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process. All of them must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norm_of_whole(norm: Tensor, tensor: Tensor) -> Tensor:
    """The norm over all parts, from that over the parts of this process, if they lie as `tensor` does."""
    if not isinstance(tensor, DTensor):
        return norm
    square = norm.square()
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard():
            dist.all_reduce(square, group=tensor.device_mesh.get_group(dimension))
    return square.sqrt()
