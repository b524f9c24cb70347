"""Writing while training goes on: in a thread, from a copy in host memory."""

from __future__ import annotations

import concurrent.futures
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdtune.distributed import Ranks
from kdtune.dtensors import like, local


class Background:
    """Where one thing at a time is written.

    The copy is the only part for which training stands still. Its memory is kept for the next one. Between several
    processes the thread speaks over groups of its own, as collectives of a group have to have one order on all ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._apart: Ranks | None = None
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._under_way: concurrent.futures.Future[None] | None = None

    def start(self, write: Callable[[Any, Ranks], None], content: dict[Any, Any]) -> None:
        """Call `write` with a copy of what it is to write, once what is under way is done. All ranks call it.

        Args:
            write: takes the copy, and the ranks among which it may speak.
            content: dicts of tensors, and of what nobody changes. A spread tensor's copy lies over the mesh of those
                ranks.

        Raises:
            Exception: as `wait`.
        """
        self.wait()
        self._apart = self._apart or self._ranks.apart()
        copy = self._copy(content)
        device = self._ranks.device
        copied = None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()

        def run(ranks: Ranks) -> None:
            if copied is not None:
                if device.index is not None:
                    torch.accelerator.set_device_index(device.index)  # a thread begins with the first one
                copied.synchronize()
            with torch.no_grad():
                write(copy, ranks)

        self._under_way = self._thread.submit(run, self._apart)

    def wait(self) -> None:
        """Until nothing is under way.

        Raises:
            Exception: whatever stopped the writing, once.
        """
        if self._under_way is not None:
            concurrent.futures.wait([self._under_way])
            done, self._under_way = self._under_way, None
            done.result()

    def _copy(self, value: Any, place: tuple[Any, ...] = ()) -> Any:
        """With tensors on the host; `place` is where in the content the value is."""
        if isinstance(value, dict):
            return {key: self._copy(inner, (*place, key)) for key, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        part = local(value)
        if place not in self._copies:
            self._copies[place] = _empty_on_host(part)
        # From a GPU it is not waited for: what changes the tensor comes after the copy there.
        copy = self._copies[place].copy_(part, non_blocking=True)
        return like(value, copy, self._apart.mesh_like if self._apart else None)


def _empty_on_host(tensor: Tensor) -> Tensor:
    """Memory of its size, to which a GPU writes by itself."""
    empty = torch.empty_like(tensor, device="cpu")
    if tensor.device.type == "cuda" and empty.nbytes:
        # Torch's own pinned memory is rounded up to powers of two.
        runtime, address = torch.cuda.cudart(), empty.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, empty.nbytes, 0))
        weakref.finalize(empty, runtime.cudaHostUnregister, address)
    return empty
