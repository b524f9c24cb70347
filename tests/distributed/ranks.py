"""Processes as torchrun starts them, without torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_IMPORTED = [
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.optim"),
    *("kdtune.cli.main", "kdtune.teacher", "kdtune.planning", "kdtune.tensor_parallel", "tiny_runs"),
]


def run(size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` in so many processes at a time, and what each returned."""
    (port,) = free_ports(1)
    # Forked off a process that has imported what takes seconds and has no threads, unlike this one.
    multiprocessing.set_forkserver_preload(_IMPORTED)
    mp.start_processes(_start, (size, port, function, folder, args), size, start_method="forkserver")
    return [torch.load(folder / f"answer_{size}_{rank}.pt", weights_only=True) for rank in range(size)]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at, each another."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(rank: int, size: int, port: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), folder / f"answer_{size}_{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once, so that the others do not wait for it
