"""One of several processes without the others, and what it sends them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

from kdtune.planning.stand_ins import replaced


@contextmanager
def one_of(size: int, rank: int = 0) -> Iterator[None]:
    """Be one of so many processes of which the others are not there. Nothing that they would send is waited for."""
    from torch.distributed.tensor import debug
    from torch.testing._internal.distributed.fake_pg import FakeStore

    debug._clear_sharding_prop_cache()  # in it are the groups of an earlier plan
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def spread_without_data(device: torch.device) -> Iterator[None]:
    """Let meshes, DTensor and FSDP2 work where tensors have no data; `meta` is a GPU for them."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    with ExitStack() as stack:
        # Which process is where is looked up in tensors, whose data is needed; and DTensor has stand-ins of its own, to
        # find out what shape a result has.
        for owner, name in (
            (DeviceMesh, "__init__"),
            (dist, "init_device_mesh"),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached"),
        ):
            stack.enter_context(replaced(owner, name, _apart(getattr(owner, name))))
        stack.enter_context(replaced(torch, "meta", _STREAMS))  # where torch looks for those of a device of this name
        stack.enter_context(replaced(_fully_shard, "_get_device_from_mesh", lambda mesh: device))
        group = _fsdp_param_group.FSDPParamGroup
        stack.enter_context(replaced(group, "_validate_no_meta_params", lambda self: None))
        yield


class _Stream(torch.cpu.Stream):
    def record_event(self) -> torch.cpu.Event:  # type: ignore[override]
        return torch.cpu.Event()  # FSDP2 tells by one that a GPU has something to wait for


_STREAMS = types.SimpleNamespace(
    Stream=_Stream, Event=torch.cpu.Event, stream=torch.cpu.stream, current_stream=torch.cpu.current_stream
)


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


# What an operator does, and which of its arguments (None: its result) is the whole that is gathered, added up or dealt
# out among the processes of a group.
_COLLECTIVES: dict[str, tuple[str, int | None]] = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::alltoall_": ("all-to-all", 0),
    "c10d::alltoall_base_": ("all-to-all", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("receive", 0),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", None),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
    "_c10d_functional::all_reduce_": ("all-reduce", 0),
    "_c10d_functional::all_to_all_single": ("all-to-all", None),
    "_c10d_functional::broadcast": ("broadcast", 0),
}


def sent(func: Any, args: tuple[Any, ...], out: Any) -> tuple[str, tuple[int, ...], float] | None:
    """What an operator sends to other processes: the kind, the ranks of the group, and the bytes of this one.

    It gets as many. Of n processes, each sends the others its part of what is gathered and theirs of what is scattered,
    (n - 1) / n of the whole; a sum that all get is scattered and gathered (Patarasuk and Yuan 2009, "Bandwidth optimal
    all-reduce algorithms for clusters of workstations").
    """
    if func._schema.name not in _COLLECTIVES:
        return None
    kind, index = _COLLECTIVES[func._schema.name]
    whole = sum(tensor.nbytes for tensor in tensors(out if index is None else args[index]))
    ranks = tuple(dist.get_process_group_ranks(_group(func, args)))
    share = 1.0 if kind in ("broadcast", "send", "receive") else 1 - 1 / len(ranks)
    return kind, ranks, (2 if kind == "all-reduce" else 1) * share * whole


def _group(func: Any, args: tuple[Any, ...]) -> dist.ProcessGroup:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "process_group":
            return dist.ProcessGroup.unbox(value)
        if argument.name == "group_name":
            return dist.distributed_c10d._resolve_process_group(value)
    raise AssertionError(f"{func} names no group")


def tensors(tree: Any) -> Iterator[Tensor]:
    """All that are in lists, tuples and the values of dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
