"""Sets that are tokenised already: columns of ids, arrays of ids, and Megatron's indexed data sets.

Nothing here is unpickled, and files are mapped into memory, not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdtune.data.batch import IGNORE

TokenDtype = Literal["uint16", "int32", "uint32", "int64"]

_BLOCK_SIZE = 2**20  # ids that are looked through at one time
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the ids' type, sequences, document bounds
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floats


def encode(row: Mapping[str, Any], column_map: Mapping[str, str], section: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The example in a row of ids.

    Args:
        row: `tokens` or `input_ids`; `labels` (the token at the same place, or -100) or `mask` (1: to be predicted) may
            be missing or null, then every token is to be predicted.
        column_map: `tokens`, `labels`, `mask` -> the columns in the row.
        section: of the settings, for messages.

    Raises:
        ValueError: no such columns, or they do not fit together.
    """
    column = column_map.get("tokens", "tokens" if "tokens" in row or "input_ids" not in row else "input_ids")
    if column not in row:
        raise ValueError(
            f"no column {column!r}; there are: {', '.join(map(str, row)) or '(none)'}. If another one is meant, say "
            f"so: {section}.column_map={{tokens: <column>}}."
        )
    tokens = _integers(row[column], column)
    for name in ("labels", "mask"):
        if name in column_map and column_map[name] not in row:
            raise ValueError(
                f"no column {column_map[name]!r}, which is {name} in {section}.column_map; there are: {', '.join(row)}."
            )
    labels = row.get(column_map.get("labels", "labels"))
    mask = row.get(column_map.get("mask", "mask"))
    if labels is not None and mask is not None:
        raise ValueError(f"it has both labels and a mask. Rename one of them away with {section}.column_map.")
    if not len(tokens):
        return []
    if labels is not None:
        return [(tokens, _labelled(tokens, _integers(labels, "labels")))]
    if mask is not None:
        is_label = _integers(np.asarray(mask).astype(np.int64) if np.asarray(mask).dtype == bool else mask, "mask")
        if len(is_label) != len(tokens) or not np.isin(is_label, (0, 1)).all():
            raise ValueError(f"the mask must be {len(tokens)} times 0 or 1, one for each token.")
        return [(tokens, is_label.astype(bool))]
    return [(tokens, np.ones(len(tokens), bool))]


def _labelled(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if len(labels) != len(tokens):
        raise ValueError(f"there are {len(tokens)} tokens and {len(labels)} labels, expected one for each token.")
    is_label = labels != IGNORE
    wrong = np.flatnonzero(is_label & (labels != tokens))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"label {i} is {labels[i]} and token {i} is {tokens[i]}; a label is the token at the same place, or "
            f"{IGNORE}. If these labels are shifted already, leave them out or give a mask."
        )
    return is_label


def _integers(value: Any, column: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"column {column!r} is {what}, expected a list of integers.")
    return array.astype(np.int64)


def open_array(path: Path, dtype: TokenDtype | None, section: str) -> np.ndarray:
    """The ids in a .npy file, or in a .bin file of nothing but ids: [t], or [n, s] for n documents.

    Messages name the section of the settings.

    Raises:
        ValueError: not an array of integers, or cut off.
    """
    if path.suffix.lower() == ".npy":
        if dtype is not None:
            raise ValueError(f"{section}.token_dtype={dtype}: {path} says itself what it holds. Leave it out.")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read as an array: {error}. Fetch it again.") from None
        if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
            raise ValueError(
                f"{path} holds {array.dtype} in {array.ndim} dimensions, expected ids: integers in one dimension, or "
                "in two, a row for each document."
            )
        return array
    if dtype is None:
        raise ValueError(
            f"{path} does not say how its ids are stored, and there is no .idx beside it. Say it: "
            f"{section}.token_dtype=uint16, int32, uint32 or int64."
        )
    size = path.stat().st_size
    if size % np.dtype(dtype).itemsize:
        raise ValueError(f"{path} has {size:,} bytes, which is no whole number of {dtype} ids. Is it of another type?")
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r") if size else np.empty(0, dtype)


def documents(array: np.ndarray, end_id: int) -> Iterator[np.ndarray]:
    """The documents in an array: its rows, or what lies between ids that end one. The end belongs to its document."""
    if array.ndim == 2:
        yield from array
        return
    start = 0
    for block in range(0, len(array), _BLOCK_SIZE):
        for end in (np.flatnonzero(array[block : block + _BLOCK_SIZE] == end_id) + block + 1).tolist():
            yield array[start:end]
            start = end
    if start < len(array):
        yield array[start:]


@dataclass(frozen=True)
class Indexed:
    """A data set of Megatron-LM: <name>.bin holds ids, <name>.idx says where sequences and documents are.

    The layout of the index (megatron/core/datasets/indexed_dataset.py, version 1), little-endian: the magic bytes
    "MMIDIDX", 0, 0; version, 8 bytes; code of the ids' type, 1 byte; number of sequences and of document bounds, 8
    bytes each; length of each sequence, 4 bytes; where in the .bin each begins, in bytes, 8 bytes; document bounds, in
    sequences, 8 bytes.

    Attributes:
        ids: [t], those of the whole .bin.
        lengths: [n] of sequences.
        starts: [n] of sequences, in ids.
        bounds: [documents + 1] in sequences.
    """

    ids: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for first, last in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            sequences = [self.ids[self.starts[i] : self.starts[i] + self.lengths[i]] for i in range(first, last)]
            yield sequences[0] if len(sequences) == 1 else np.concatenate([self.ids[:0], *sequences])


def open_indexed(path: Path) -> Indexed:
    """Opens <name>.idx and <name>.bin, and checks that each fits the other before anything is read by them.

    Raises:
        FileNotFoundError: there is no .bin.
        ValueError: a file is of another kind, of another version, or cut off.
    """
    data_path = path.with_suffix(".bin")
    if not data_path.is_file():
        raise FileNotFoundError(f"{path} is the index of {data_path}, which is not there. Put both into one folder.")
    size, data_size = path.stat().st_size, data_path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{path} is not the index of an indexed data set: it does not begin with MMIDIDX.")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{path} has version {version}; only version 1 is known.")
    if code not in _DTYPES:
        raise ValueError(f"{path} has the type code {code}, which is none of integers: {_DTYPES}.")
    expected = _HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
    if size != expected:
        raise ValueError(
            f"{path} has {size:,} bytes, but {num_sequences:,} sequences and {num_bounds:,} document bounds make "
            f"{expected:,}. It is cut off, or of a set with other things than text in it."
        )
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    if data_size % dtype.itemsize:
        raise ValueError(f"{data_path} has {data_size:,} bytes, which is no whole number of {dtype.name} ids.")

    place = _HEADER.size
    lengths = _map(path, "<i4", place, num_sequences)
    pointers = _map(path, "<i8", place + 4 * num_sequences, num_sequences)
    bounds = _map(path, "<i8", place + 12 * num_sequences, num_bounds)
    ends = pointers + lengths.astype(np.int64) * dtype.itemsize
    if num_sequences and (lengths.min() < 0 or pointers.min() < 0 or (pointers % dtype.itemsize).any()):
        raise ValueError(f"{path} has sequences of negative length or place, or that begin inside an id.")
    if num_sequences and ends.max() > data_size:
        raise ValueError(
            f"{path} has a sequence that ends at byte {ends.max():,}, but {data_path} has {data_size:,} bytes. It is "
            "cut off, or belongs to another index."
        )
    if num_bounds == 0 or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise ValueError(f"{path} has document bounds that do not go from 0 to its {num_sequences:,} sequences.")
    ids = np.memmap(data_path, dtype, "r") if data_size else np.empty(0, dtype)
    return Indexed(ids, lengths, pointers // dtype.itemsize, bounds)


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)
