"""Files that are there whole or not at all: written aside, synced and renamed. Many processes may write at one time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_ABANDONED = 24 * 3600  # seconds without a change, after which nobody writes there any more


def aside(path: Path) -> Path:
    """Beside `path`, hidden, and of no other writer: `.name.process.nanoseconds`."""
    return path.with_name(f".{path.name}.{os.getpid()}.{time.time_ns()}")


def write(path: Path, content: bytes, *, is_new: bool = False) -> None:
    """Write a file.

    Args:
        path: of the file; its folder is there.
        content: all of it.
        is_new: only if there is no such file yet; of several writers the first wins.

    Raises:
        OSError: the disk is full or not writable; what was there stays.
    """
    written = aside(path)
    try:
        with open(written, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not is_new:
            os.replace(written, path)
        else:
            try:
                os.link(written, path)
            except FileExistsError:  # another writer was faster
                pass
            except OSError:  # a file system without hard links
                os.replace(written, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}. What was there stays.") from error
    finally:
        written.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, name: re.Pattern[str], delete: Callable[[Path], object] = Path.unlink) -> None:
    """Delete what killed writers left. They may have been on another machine: age alone tells that they are gone.

    Args:
        folder: where they wrote.
        name: of what they may have left.
        delete: called with each such file or folder.
    """
    for path in folder.iterdir():
        if name.fullmatch(path.name):
            with suppress(OSError):  # another process deletes it, too, or it is another user's
                parts = path.iterdir() if path.is_dir() else ()
                if time.time() - max(part.stat().st_mtime for part in (path, *parts)) > _ABANDONED:
                    delete(path)
