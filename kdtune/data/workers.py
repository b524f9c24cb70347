"""A function over many items in several processes, in order."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING_PER_WORKER = 4  # items that are sent ahead of the one whose result is asked for

# A forked process is there at once and has the function; a spawned one first imports torch and builds the tokenizer,
# which takes longer than this process needs for ten thousand rows. What a fork may break on, locks that other threads
# held, is nothing that tokenising takes: no torch, no CUDA, no thread of a tokenizer. (torch's DataLoader forks, too.)
# On macOS the system's own libraries may not be used in a fork.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_function: Callable[[Any], Any]  # of this worker


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map(function, items)`, computed by `num_workers` processes; 0: by this one.

    Items are taken only a little ahead of the results, so that memory does not grow with their number.

    Args:
        function: can be pickled, as can items and results. It goes once to each process. It must not use torch or
            threads, for the sake of forks.
        items: in their order.
        num_workers: processes.

    Raises:
        ValueError: a process died, most likely for lack of memory. What `function` raises comes out as it is.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=(function,))
    waiting: deque[Future[Any]] = deque()

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        # This may start a process, which gets Ctrl-C, too: it is held back until the process ignores it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    try:
        submit(int)  # starts all of them, before reading the items has started threads of its own
        for item in items:
            waiting.append(submit(_call, item))
            if len(waiting) > num_workers * _WAITING_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of the {num_workers} processes that tokenise ended by itself; often the machine is out of memory. "
            "Take fewer (num_workers), or 0 to tokenise in this process."
        ) from None
    finally:
        # Also after Ctrl-C and errors: what was not begun is not, and nobody waits for what was.
        pool.shutdown(wait=not waiting, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that waits for them stops them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the handlers of its parent
    _function = function
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A pool's process waits for work on a pipe that it holds both ends of: it would outlive a parent that was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
