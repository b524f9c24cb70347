"""The folder on disk: shards that many processes write at one time, and their reader.

A shard's name is a hash of its index, so that writers need not speak with each other, and a shard is there whole or not
at all: it is written aside, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import time
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from kdtune import files
from kdtune.teacher_cache.answers import Answers
from kdtune.teacher_cache.card import FORMAT, VERSION, Card
from kdtune.teacher_cache.codec import HIDDEN_TYPES, Codec
from kdtune.teacher_cache.config import HiddenDtype

CARD = "card.json"
HEAD = "head.safetensors"
SHARDS = "shards"
TOKENIZER = "tokenizer"  # folder of the tokenizer's files
_SHARD_NAME = re.compile(r"[0-9a-f]{16}\.safetensors")
_INDEX: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<u8"),
    "offsets": np.dtype("<i8"),
    "num_tokens": np.dtype("<i4"),
    "crcs": np.dtype("<u4"),
}
_HEAD_TYPES = {"bf16": "BF16", "fp32": "F32"}
_SHARD_SECONDS = 600.0  # after which a shard is closed as it is: a slow teacher's work is not lost, either
_ASIDE = re.compile(r"\..+\.\d+\.\d+")  # as `files.aside` names them
_NUM_MAPPED = 256  # shards that are mapped at one time: each takes a file descriptor


class Writer:
    """Adds answers to a cache, which is made if it is not there.

    Several may write to one folder at one time: ranks, or jobs. What was added last is on disk after `close`, before
    it what shards hold: one is closed when it has `shard_bytes` or is ten minutes old. `add` may be called by several
    threads, which then compress at one time.
    """

    def __init__(self, folder: str | Path, card: Card, shard_bytes: int = 2**26):
        """Begin or extend a cache.

        Args:
            folder: of the cache.
            card: what is added; its `datasets` are added to those of the folder's card.
            shard_bytes: of a shard, about.

        Raises:
            ValueError: the folder holds something else, or answers of another kind or teacher.
            OSError: it cannot be written.
        """
        self.folder = Path(folder)
        self.card = card
        self.num_examples = self.num_tokens = self.num_bytes = 0
        self._shard_bytes = shard_bytes
        self._codec = _codec(card)
        self._written: set[int] = set()
        self._lock = Lock()
        self._clear()
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / SHARDS):
            files.sweep(folder, _ASIDE)
        self._write_card()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(self, example_id: int, answers: Answers) -> None:
        """Keep the answers of an example. One with an id that this writer has had is of the same tokens: left out.

        Raises:
            ValueError: they are not what a teacher can say, or not of the card's kind.
        """
        data = self._codec.encode(answers)
        with self._lock:
            if example_id in self._written:
                return
            if not self._ids:
                self._began = time.monotonic()
            self._written.add(example_id)
            self._ids.append(example_id)
            self._num_tokens.append(len(answers))
            self._data.append(data)
            self._size += len(data)
            self.num_examples += 1
            self.num_tokens += len(answers)
            self.num_bytes += len(data)
            if self._size >= self._shard_bytes or time.monotonic() - self._began > _SHARD_SECONDS:
                self._close_shard()

    def close(self) -> None:
        """Write what is not on disk yet."""
        with self._lock:
            self._close_shard()
        self._write_card()

    def _clear(self) -> None:
        self._ids: list[int] = []
        self._num_tokens: list[int] = []
        self._data: list[bytes] = []
        self._size = 0
        self._began = 0.0

    def _close_shard(self) -> None:
        if not self._ids:
            return
        index = {
            "ids": np.array(self._ids, _INDEX["ids"]),
            "offsets": np.cumsum([0, *map(len, self._data)]).astype(_INDEX["offsets"]),
            "num_tokens": np.array(self._num_tokens, _INDEX["num_tokens"]),
            "crcs": np.array(list(map(zlib.crc32, self._data)), _INDEX["crcs"]),
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "card": self.card.hash}
        content = save({**index, "data": np.frombuffer(b"".join(self._data), np.uint8)}, metadata)
        files.write(self.folder / SHARDS / f"{_hash(index)}.safetensors", content)
        self._clear()

    def _write_card(self) -> None:
        """Make the folder's card, or note there which data sets are added.

        Of two jobs that do so at one moment the later wins, which is why `close` does it once more.
        """
        path = self.folder / CARD
        if not path.exists():
            _check_empty(self.folder)
            files.write(path, self.card.to_json().encode(), is_new=True)
        found = read_card(self.folder)
        _check_same(self.folder, found, self.card)
        both = found.with_datasets(self.card.datasets)
        if both != found:
            files.write(path, both.to_json().encode())


class TeacherCache:
    """Reads a cache. It may be used by several threads.

    Attributes:
        folder: of the cache.
        card: what it is.
        ids: [n] uint64, ascending: the examples it has.
        num_tokens: labelled tokens of all of them.
        num_bytes: of all shards.
    """

    def __init__(self, folder: str | Path):
        """Open a cache: what its shards have when it is opened.

        Raises:
            ValueError: it is no cache, or a shard is cut off, damaged or of another cache.
            OSError: it cannot be read.
        """
        self.folder = Path(folder)
        self.card = read_card(self.folder)
        self._codec = _codec(self.card)
        self._paths = _shards(self.folder)
        indices = [_open(path, self.card) for path in self._paths]
        self.num_bytes = sum(path.stat().st_size for path in self._paths)

        def join(name: str) -> np.ndarray:
            return np.concatenate([np.empty(0, _INDEX[name]), *(index[name] for index in indices)])

        # The first shard counts if two jobs answered one example.
        self.ids, order = np.unique(join("ids"), return_index=True)
        sizes = [len(index["ids"]) for index in indices]
        starts = [index["data"] + index["offsets"][:-1] for index in indices]
        self._shard = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._start = np.concatenate([np.empty(0, np.int64), *starts])[order]
        self._size = np.concatenate([np.empty(0, np.int64), *(np.diff(index["offsets"]) for index in indices)])[order]
        self._num_tokens = join("num_tokens")[order]
        self._crcs = join("crcs")[order]
        self.num_tokens = int(self._num_tokens.sum(dtype=np.int64))
        self._map = lru_cache(_NUM_MAPPED)(_map)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, example_id: int) -> bool:
        return self._find(example_id) is not None

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Which of [n] uint64 ids the cache does not have: indices, ascending; of equal ones the first."""
        found, first = np.unique(np.asarray(ids, np.uint64), return_index=True)
        return np.sort(first[~np.isin(found, self.ids, assume_unique=True)])

    def read(self, example_id: int) -> Answers:
        """The answers of an example.

        Raises:
            KeyError: it is not in the cache.
            ValueError: its bytes were changed.
        """
        place = self._place(example_id)
        path, start = self._paths[self._shard[place]], int(self._start[place])
        data = self._map(path)[start : start + int(self._size[place])]
        if zlib.crc32(data) != self._crcs[place]:
            raise ValueError(
                f"{path}: the answers of example {example_id:016x} are not what was written (their checksum differs). "
                "Delete the shard and run cache_teacher_logits again: it makes anew what is missing."
            )
        return self._codec.decode(data, int(self._num_tokens[place]))

    def head(self) -> tuple[np.ndarray, HiddenDtype]:
        """The teacher's head, of store.kind=hidden: weight [v, d], float32 or the bits of bf16 as uint16, and which.

        Raises:
            ValueError: it is missing, damaged or of another size than the card says.
        """
        path = self.folder / HEAD
        again = "Delete it and run cache_teacher_logits again: it writes the head anew."
        try:
            with safe_open(path, "np") as file:
                crc = (file.metadata() or {}).get("crc")
            ((_, tensor),) = deserialize(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path} is missing, without which hidden states are no predictions. {again}") from None
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is cut off or damaged ({error}). {again}") from None
        assert self.card.hidden is not None
        shape = [self.card.vocab_size, self.card.hidden["size"]]
        if crc != str(zlib.crc32(tensor["data"])) or tensor["shape"] != shape:
            raise ValueError(f"{path} is not what was written, a weight {shape}. {again}")
        dtype: HiddenDtype = "bf16" if tensor["dtype"] == "BF16" else "fp32"
        return np.frombuffer(tensor["data"], HIDDEN_TYPES[dtype]).reshape(shape), dtype

    def summary(self) -> str:
        """One line: what it is, and how large."""
        store = self.card.store
        kept = {
            "top_k": f"top {store.top_k}" + (f" up to {store.top_p:.0%}" if store.top_p else ""),
            "samples": f"{store.num_samples} samples",
            "hidden": f"hidden states in {store.hidden_dtype}",
        }[store.kind]
        bits = "" if store.kind == "hidden" else f" in {store.bits} bits"
        return (
            f"{kept}{bits} of {self.card.teacher.name}: {len(self):,} examples, {self.num_tokens:,} labelled tokens, "
            f"{self.num_bytes / 2**20:,.1f} MiB ({self.num_bytes / max(1, self.num_tokens):,.1f} bytes a token)"
        )

    def _find(self, example_id: int) -> int | None:
        place = int(np.searchsorted(self.ids, np.uint64(example_id)))
        return place if place < len(self.ids) and int(self.ids[place]) == example_id else None

    def _place(self, example_id: int) -> int:
        if (place := self._find(example_id)) is None:
            raise KeyError(f"{self.folder} has no example {example_id:016x}")
        return place


def read_card(folder: str | Path) -> Card:
    """What a cache is, without a look at its shards.

    Raises:
        ValueError: it is no cache, or of another version.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    try:
        content = (folder / CARD).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} is no teacher cache: it has no {CARD}. Give the folder that cache_teacher_logits wrote."
        ) from None
    try:
        return Card.from_json(content)
    except ValueError as error:
        raise ValueError(f"{folder / CARD} cannot be used: {error}. Make the cache again.") from None


def open_to_extend(folder: str | Path, card: Card) -> TeacherCache | None:
    """What a folder has, before more is added; None: there is no cache yet.

    Raises:
        ValueError: as `Writer` and `TeacherCache`.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    if not (folder / CARD).exists():
        _check_empty(folder)
        return None
    _check_same(folder, read_card(folder), card)
    return TeacherCache(folder)


def write_head(folder: str | Path, weight: np.ndarray, dtype: HiddenDtype) -> None:
    """Put the teacher's head beside its hidden states, unless it is there.

    Args:
        folder: of the cache.
        weight: [v, d], float32, or the bits of bf16 as uint16.
        dtype: which of the two.
    """
    data = np.ascontiguousarray(weight).tobytes()
    # By hand: numpy, and so safetensors.numpy, has no bf16.
    entry = {"dtype": _HEAD_TYPES[dtype], "shape": list(weight.shape), "data_offsets": [0, len(data)]}
    metadata = {"format": FORMAT, "crc": str(zlib.crc32(data))}
    header = json.dumps({"__metadata__": metadata, "weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + data
    files.write(Path(folder) / HEAD, content, is_new=True)


def write_tokenizer(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Put the tokenizer that made the examples beside the answers, so that students can be compared with it.

    Args:
        folder: of the cache.
        contents: of its files, by name.
    """
    for name, content in contents.items():
        path = Path(folder) / TOKENIZER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)


def _check_empty(folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir() if entry.name[0] != "."} if folder.is_dir() else set()
    if CARD in names:
        return  # another writer has begun it since it was looked for
    strangers = sorted(names - {SHARDS})
    if strangers or (SHARDS in names and _shards(folder)):
        raise ValueError(
            f"{folder} is to become a teacher cache and holds other files: "
            f"{', '.join(strangers[:5]) or 'shards without a card'}. Give another folder, or empty it."
        )


def _check_same(folder: Path, found: Card, card: Card) -> None:
    if differences := found.differences(card):
        raise ValueError(
            f"{folder} holds other answers than those to be added: {'; '.join(differences)}. A cache is of one "
            "teacher, tokenizer and kind. Give another folder, or the settings of this one."
        )


def _codec(card: Card) -> Codec:
    return Codec(card.store, card.vocab_size, card.hidden["size"] if card.hidden else None)


def _shards(folder: Path) -> list[Path]:
    if not (folder / SHARDS).is_dir():  # all were deleted
        return []
    paths = sorted(path for path in (folder / SHARDS).iterdir() if path.name[0] != ".")
    if strangers := [path.name for path in paths if not _SHARD_NAME.fullmatch(path.name)]:
        raise ValueError(
            f"{folder / SHARDS} holds what kdtune did not write there: {', '.join(strangers[:5])}. Move it away."
        )
    return paths


def _hash(index: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in _INDEX:
        digest.update(index[name].tobytes())
    return digest.hexdigest()


def _open(path: Path, card: Card) -> dict[str, Any]:
    """The index of a shard, and where its data begins in the file, as `data`."""
    again = "Delete it and run cache_teacher_logits again: it makes anew what is missing."
    try:
        with safe_open(path, "np") as file:  # compares the header with the file's size
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
                raise ValueError(f"{path} is no shard of a teacher cache of version {VERSION}. Move it away.")
            if metadata.get("card") != card.hash:
                raise ValueError(
                    f"{path} is of another teacher, tokenizer or kind than {CARD} says (of the card with hash "
                    f"{metadata.get('card')}, not {card.hash}). Move it to the cache that it is of, or delete it."
                )
            index: dict[str, Any] = {name: file.get_tensor(name) for name in _INDEX}
            (size,) = file.get_slice("data").get_shape()
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or damaged ({error}). {again}") from None
    if f"{_hash(index)}.safetensors" != path.name or index["offsets"][-1] != size:
        raise ValueError(f"{path} is not what was written: its name is the hash of another index. {again}")
    index["data"] = path.stat().st_size - size
    return index


def _map(path: Path) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
