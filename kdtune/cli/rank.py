"""One process of several that run a recipe: it says what no other says, and reports how it ended.

The report is torchrun's own, a file for each process (TORCHELASTIC_ERROR_FILE), so that both `kdtune run` and
`torchrun -m kdtune run` have the message. No torch is imported here.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

LAUNCHED = "KDTUNE_LAUNCHED"  # set by the launcher, which prints reports and lets all ranks end by themselves
MISTAKES = (ValueError, OSError, FloatingPointError)  # of the user: the message says it all


def is_one() -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def speaking_once() -> Iterator[None]:
    """Silence all ranks but the first, say every warning once, and report a failure.

    Raises:
        SystemExit: this rank was asked to stop.
    """
    if int(os.environ["RANK"]) > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # not only sys.stdout: C++ prints, too
    warnings.showwarning = lambda message, *_, **__: _say_once(f"warning: {message}")
    signal.signal(signal.SIGTERM, _stop)  # until training takes it over
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int) or end.code < 128:  # not after a signal
            raise
        _leave(end.code)
    except KeyboardInterrupt:
        _say_once("\nkdtune: interrupted")
        _leave(130)
    except Exception as error:
        _fail(error)
    else:
        _leave_group()


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _leave(status: int) -> NoReturn:
    """End in order. kdtune's launcher lets all ranks do so, and takes the status from the report."""
    _report("", {"status": status})
    _leave_group()
    raise SystemExit(0 if LAUNCHED in os.environ else status)


def _leave_group() -> None:
    if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # without it torch complains


def _fail(error: Exception) -> NoReturn:
    is_mistake = isinstance(error, MISTAKES)
    message = str(error) if is_mistake else "".join(traceback.format_exception_only(error)).strip()
    status = 2 if is_mistake else 1
    _report(message, {"status": status, "is_consequence": _is_consequence(error)})
    if LAUNCHED not in os.environ:
        _say_once(message, f"kdtune: error: rank {os.environ['RANK']}: {message}")
    sys.stdout.flush()
    os._exit(status)  # at once: taking down communication may wait for ranks that wait for this one


def _is_consequence(error: Exception) -> bool:
    """Whether another rank's end is the reason."""
    is_of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return is_of_torch or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _report(message: str, values: dict[str, object]) -> None:
    """Write what torchelastic reads, with more for kdtune's launcher."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
        report = {"message": {"message": message, "extraInfo": extra}, "time": time.time(), **values}
        Path(path).write_text(json.dumps(report))


def _say_once(message: str, text: str = "") -> None:
    """Write a text, or else the message, to stderr, unless another rank on this machine has said the same."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = Path(path).parents[1] / f"said_{hashlib.sha256(message.encode()).hexdigest()}"
        try:
            said.touch(exist_ok=False)
        except FileExistsError:
            return
    print(text or message, file=sys.stderr, flush=True)
