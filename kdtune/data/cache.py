"""Tokenised rows on disk: written once, mapped into memory afterwards.

A set is a folder in cache_dir, named after a hash of all that its tokens depend on: the rows' files, the tokenizer's
files, the settings and kdtune's version. It holds four arrays and meta.json, which repeats what was hashed, so that a
look at it tells what it is.

Files of rows are known by name, size, time of change and their first and last 64 KiB, and not by a hash of all their
bytes: that would read as much as the second run is to be spared. To go unnoticed, a change must keep the size, the
nanosecond and both ends. Files of a tokenizer are small and are hashed as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kdtune import __version__, files
from kdtune.data.config import SourceConfig
from kdtune.data.examples import Counts, Examples, Part
from kdtune.data.ids import example_ids
from kdtune.data.rows import Rows
from kdtune.tokenizers import Tokenizer

FORMAT = 3  # of the files in a folder
META = "meta.json"
_COLUMNS = {"tokens": np.int32, "is_label": np.bool_, "offsets": np.int64, "ids": np.uint64, "rows": np.int64}
_HEADER_SIZE = 128
_END_SIZE = 2**16
_NUM_CHECKED = 256  # examples whose ids are computed again when a set is opened
_ASIDE = re.compile(r"\..+-[0-9a-f]{16}\.\d+\.\d+")  # of a set, as `files.aside` names them

# Settings that change where and how tokens are made or dealt out, but not which they are; the chat template is part of
# the tokenizer. A setting that is not named here makes another set.
_NO_TOKENS = (
    "source",
    "sources",
    "weight",
    "chat_template",
    "num_workers",
    "cache_dir",
    "packed",
    "group_by_length",
    "streaming",
    "shuffle_buffer",
)


class Damaged(ValueError):
    """A cached set that is not what was written. It can be made again."""


def key(
    cfg: SourceConfig, rows: Rows, tokenizer: Tokenizer, max_seq_len: int, vocab_size: int | None
) -> dict[str, Any]:
    """All that the tokens of a set depend on, as json can hold it.

    Args:
        cfg: the settings of the rows.
        rows: where they are.
        tokenizer: with the chat template that the settings name.
        max_seq_len: inputs of an example.
        vocab_size: rows with ids from this on are left out; None: none are.
    """
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in _NO_TOKENS}
    return {
        "format": FORMAT,
        "kdtune": __version__,
        "shards": [[shard.name, shard.size] for shard in rows.shards if not shard.files],
        "files": [_identity(file) for file in rows.files],
        "tokenizer": tokenizer.fingerprint,
        "max_seq_len": max_seq_len,
        "vocab_size": vocab_size,
        "settings": settings,
    }


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        digest.update(file.read(_END_SIZE))
        file.seek(max(0, status.st_size - _END_SIZE))
        digest.update(file.read(_END_SIZE))
    return [path.name, status.st_size, status.st_mtime_ns, digest.hexdigest()]


def folder(cache_dir: str | Path, source: str, key: dict[str, Any]) -> Path:
    """Where the set with this key is, or would be."""
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Path(cache_dir) / f"{Path(source).name or 'rows'}-{digest}"


def write(folder: Path, key: dict[str, Any], parts: Iterable[Part]) -> None:
    """Writes a set aside and gives it its name when it is whole.

    Memory does not grow with the number of rows. What an interrupted run leaves, no later one takes for a set. Of two
    runs that write the same set at one time, the first to finish wins.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.sweep(folder.parent, _ASIDE, _delete)
    aside = files.aside(folder)
    aside.mkdir()
    try:
        counts, sizes = _write_columns(aside, parts)
        meta = {"key": key, "sizes": sizes, "counts": dataclasses.asdict(counts)}
        files.write(aside / META, json.dumps(meta, indent=1).encode())
        try:
            os.rename(aside, folder)
        except OSError:
            if not (folder / META).is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_columns(aside: Path, parts: Iterable[Part]) -> tuple[Counts, dict[str, int]]:
    counts, sizes = Counts(), dict.fromkeys(_COLUMNS, 0)
    columns = {name: open(aside / f"{name}.npy", "wb") for name in _COLUMNS}  # noqa: SIM115
    try:
        for name, file in columns.items():
            file.write(_header(_COLUMNS[name], 0))

        def append(name: str, array: np.ndarray) -> None:
            columns[name].write(np.ascontiguousarray(array, _COLUMNS[name]).data)
            sizes[name] += len(array)

        append("offsets", np.zeros(1, np.int64))
        for part in parts:
            append("offsets", sizes["tokens"] + np.cumsum(part.sizes))
            append("tokens", part.tokens)
            append("is_label", part.is_label)
            append("ids", part.ids)
            append("rows", part.rows)
            counts.add(part.counts)
        for name, file in columns.items():
            file.seek(0)
            file.write(_header(_COLUMNS[name], sizes[name]))
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in columns.values():
            file.close()
    return counts, sizes


def _header(dtype: Any, size: int) -> bytes:
    """The header of a .npy file, version 1.0, as long for every size: it is written first and corrected last."""
    text = f"{{'descr': '{np.dtype(dtype).newbyteorder('<').str}', 'fortran_order': False, 'shape': ({size},), }}"
    length = _HEADER_SIZE - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.encode().ljust(length - 1) + b"\n"


def read(folder: Path, key: dict[str, Any], name: str, max_seq_len: int) -> Examples | None:
    """The set in a folder, mapped into memory; None if there is no such folder.

    Raises:
        Damaged: a file is missing, cut off or changed. `remove` makes room for another.
        ValueError: the folder holds something else.
    """
    try:
        strangers = sorted({entry.name for entry in folder.iterdir()} - _names())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        strangers = ["a file"]
    if strangers:
        raise ValueError(
            f"{folder} holds what kdtune did not write there: {', '.join(strangers[:5])}. Its name is that of the "
            "tokenised rows. Move it away, or give another cache_dir."
        )
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        sizes, counts, found = meta["sizes"], Counts(**meta["counts"]), meta["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / META} cannot be read ({type(error).__name__}: {error})") from None
    if found != json.loads(json.dumps(key)):
        raise Damaged(f"{folder / META} describes other rows than its folder's name")
    try:
        arrays = {
            column: _map(folder / f"{column}.npy", dtype, sizes.get(column)) for column, dtype in _COLUMNS.items()
        }
    except FileNotFoundError as error:  # another process is removing the set
        raise Damaged(f"{error.filename} is gone") from None
    examples = Examples(name, max_seq_len, **arrays, counts=counts)
    _check(folder, examples)
    return examples


def _names() -> set[str]:
    return {META, *(f"{column}.npy" for column in _COLUMNS)}


def _map(path: Path, dtype: Any, size: Any) -> np.ndarray:
    if not isinstance(size, int):
        raise Damaged(f"{path.with_name(META)} does not say how long {path.name} is")
    expected = _HEADER_SIZE + size * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise Damaged(f"{path} has {found:,} bytes instead of {expected:,}")
    with open(path, "rb") as file:
        if file.read(_HEADER_SIZE) != _header(dtype, size):
            raise Damaged(f"{path} has another header than it was written with")
    return np.memmap(path, dtype, "r", _HEADER_SIZE, (size,)) if size else np.empty(0, dtype)


def _check(folder: Path, examples: Examples) -> None:
    offsets, count = examples.offsets, len(examples)
    sizes = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(examples.tokens) or (sizes < 2).any():
        raise Damaged(f"{folder}: the borders of the examples do not fit their tokens")
    if len(examples.is_label) != len(examples.tokens) or {len(examples.ids), len(examples.rows)} != {count}:
        raise Damaged(f"{folder}: tokens and labels, or examples and their rows, are not as many")
    for i in np.unique(np.linspace(0, count - 1, min(count, _NUM_CHECKED)).astype(np.int64)).tolist():
        start, stop = offsets[i], offsets[i + 1]
        example = examples.tokens[start:stop], examples.is_label[start:stop]
        if example_ids(*example, sizes[i : i + 1])[0] != examples.ids[i]:
            raise Damaged(f"{folder}: example {i} is not what was written")


def remove(folder: Path) -> None:
    """Deletes a damaged set. It loses its name first, so that no other process finds a part of it."""
    aside = files.aside(folder)
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(folder, aside)
        _delete(aside)


def _delete(folder: Path) -> None:
    """The files that kdtune writes, and the folder."""
    for name in _names():
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
