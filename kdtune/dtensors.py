"""Tensors of which each process holds a part: `torch.distributed.tensor.DTensor`. A plain tensor is held whole."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(tensor: object) -> TypeGuard[DTensor]:
    """Whether each process holds a part of it."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes most of a second
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds."""
    return tensor.to_local() if is_spread(tensor) else tensor


def rows_of(tensor: Tensor) -> slice:
    """Which rows this process holds."""
    if not is_spread(tensor):
        return slice(0, len(tensor))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offsets[0], offsets[0] + shape[0])


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """The tensor that lies over the processes as `tensor` does, and of which this one holds `part`."""
    if not is_spread(tensor):
        return part
    mesh, placements = tensor.device_mesh, tensor.placements
    return type(tensor).from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process. All of them must call."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def norm_of_whole(norm: Tensor, tensor: Tensor) -> Tensor:
    """The norm over all parts, from that over the parts of this process, if they lie as `tensor` does."""
    if not is_spread(tensor):
        return norm
    import torch.distributed as dist

    square = norm.square()
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard():
            dist.all_reduce(square, group=tensor.device_mesh.get_group(dimension))
    return square.sqrt()
