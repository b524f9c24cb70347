"""Tensors of which each process holds a part: `torch.distributed.tensor.DTensor`. A plain tensor is held whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_spread(tensor: object) -> TypeGuard[DTensor]:
    """Whether each process holds a part of it."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes most of a second
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds."""
    return tensor.to_local() if is_spread(tensor) else tensor


def held(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of each dimension this process holds."""
    if not is_spread(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))


def like(tensor: Tensor, part: Tensor, mesh_like: Callable[[DeviceMesh], DeviceMesh] | None = None) -> Tensor:
    """The tensor that lies over the processes as `tensor` does, and of which this one holds `part`.

    Args:
        tensor: one that lies over a mesh, or a plain one; then the part is all of it.
        part: on any device; it stays there.
        mesh_like: takes the mesh of `tensor`, and gives another one to lie over. None: the same.
    """
    if not is_spread(tensor):
        return part
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh = tensor.device_mesh if mesh_like is None else mesh_like(tensor.device_mesh)
    meta = TensorMeta(tensor.shape, tensor.stride(), part.dtype)
    # Not `from_local`, which would put all that is in host memory onto the GPU.
    return type(tensor)(part, DTensorSpec(mesh, tensor.placements, tensor_meta=meta), requires_grad=False)


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process. All of them must call."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def norm_of_whole(norms: Iterable[Tensor], tensors: Iterable[Tensor]) -> Tensor:
    """The norm over all parts of all tensors, from the norms of the parts that are here."""
    by_split: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for norm, tensor in zip(norms, tensors, strict=True):
        by_split.setdefault(_splits(tensor), []).append(norm)
    found = []
    for groups, parts in by_split.items():
        norm = torch.linalg.vector_norm(torch.stack(parts))
        if groups:
            square = norm.square()
            for group in groups:
                dist.all_reduce(square, group=group)
            norm = square.sqrt()
        found.append(norm)
    return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))


def _splits(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of processes that hold different parts of it. What others hold is the same."""
    if not is_spread(tensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(i) for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
