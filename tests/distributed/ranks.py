"""Processes as torchrun starts them, without torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_IMPORTED = [  # also what torch imports late, which each process would import anew
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.optim"),
    *("torch._dynamo", "torch.onnx", "pytest"),
    *("kdtune.cli.main", "kdtune.teacher", "kdtune.planning", "kdtune.tensor_parallel", "tiny_runs"),
]


def run(size: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` in so many processes at a time, and what each returned."""
    # Forked off a process that has imported what takes seconds and has no threads, unlike this one.
    multiprocessing.set_forkserver_preload(_IMPORTED)
    mp.start_processes(_start, (size, free_port(), function, folder, args), size, start_method="forkserver")
    return [torch.load(folder / f"answer_{size}_{rank}.pt", weights_only=True) for rank in range(size)]


def start_alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in one process more, which can be killed."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def free_port() -> int:
    """Of this machine: nobody listens at it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def meet_at_another_port(told: Path) -> None:
    """For the next meeting of these processes. It is looked for now: what they open meanwhile takes ports, too.

    Args:
        told: a new file in which the first one tells the others.
    """
    if os.environ["RANK"] == "0":
        aside = told.with_suffix(".tmp")
        aside.write_text(str(free_port()))
        aside.rename(told)
    while not told.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = told.read_text()


def _start(rank: int, size: int, port: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), folder / f"answer_{size}_{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once, so that the others do not wait for it
