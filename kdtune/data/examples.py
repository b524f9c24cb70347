"""A tokenised data set, held compactly."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kdtune.data import rows
from kdtune.data.batch import IGNORE
from kdtune.data.config import DatasetConfig
from kdtune.data.formats import Encoded, row_encoder
from kdtune.tokenizers import Tokenizer

_CHUNK_SIZE = 256  # rows whose tokens are Python integers at one time
_HASH_BLOCK = 2**20  # tokens whose hashes, 8 bytes each, exist at one time


@dataclass
class Counts:
    """What became of the rows."""

    num_rows: int = 0  # read
    num_truncated: int = 0  # longer than max_seq_len and cut
    num_dropped: int = 0  # without anything to predict, as read or after they were cut

    def add(self, other: Counts) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Part(NamedTuple):
    """The examples of some rows, one behind the other."""

    tokens: np.ndarray  # [t] int32
    is_label: np.ndarray  # [t] bool: this token is to be predicted
    sizes: np.ndarray  # [n] int64: tokens of each example
    ids: np.ndarray  # [n] uint64
    counts: Counts


@final
class Examples:
    """Tokenised rows: `examples[i]` is (tokens [s], labels [s]), int64, labels already shifted.

    A row is stored up to its last labelled token (what comes after it cannot change any loss), in flat arrays of five
    bytes per token, in memory or mapped from files: there is no Python object for a row.

    Attributes:
        name: which data set this is, for messages.
        max_seq_len: the limit that was applied.
        tokens: [t] int32, all examples one behind the other; the first token of each is only an input.
        is_label: [t] bool, whether a token is to be predicted.
        offsets: [n + 1] int64, where examples begin and end.
        ids: [n] uint64, a hash of the tokens and labels of an example: the same in every run, order and source.
        counts: what became of the rows that were read.
    """

    def __init__(
        self,
        name: str,
        max_seq_len: int,
        tokens: np.ndarray,
        is_label: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        counts: Counts,
    ) -> None:
        self.name = name
        self.max_seq_len = max_seq_len
        self.tokens, self.is_label, self.offsets, self.ids = tokens, is_label, offsets, ids
        self.counts = counts

    @classmethod
    def of(cls, name: str, max_seq_len: int, encoded: Iterable[Encoded]) -> Examples:
        """Of encoded rows: each a list of (tokens, whether each token is to be predicted)."""
        return _join(name, max_seq_len, _parts(encoded, max_seq_len))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        start, stop = self.offsets[i], self.offsets[i + 1]
        tokens = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
        is_label = torch.from_numpy(self.is_label[start + 1 : stop].astype(bool))
        return tokens[:-1], torch.where(is_label, tokens[1:], IGNORE)

    def length(self, i: int) -> int:
        """Positions of example i."""
        return int(self.offsets[i + 1] - self.offsets[i]) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """[n] int64, positions of each example."""
        return np.diff(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        """Rows read; len() is smaller where rows were dropped, greater where a row makes several examples."""
        return self.counts.num_rows

    @property
    def num_truncated(self) -> int:
        """Rows that were longer than max_seq_len."""
        return self.counts.num_truncated

    @property
    def num_dropped(self) -> int:
        """Rows in which nothing has a label, as read or after truncation."""
        return self.counts.num_dropped

    @property
    def num_tokens(self) -> int:
        """Positions of all examples together, without padding."""
        return len(self.tokens) - len(self)

    @cached_property
    def num_labels(self) -> int:
        """Scored positions of all examples together."""
        return int(np.count_nonzero(self.is_label))

    @cached_property
    def fingerprint(self) -> int:
        """Changes when any token, label or border does: a resumed run checks that it reads the same data."""
        return zlib.crc32(self.ids.tobytes())

    def summary(self) -> str:
        """One line: how much there is, and what was cut or dropped."""
        parts = [f"{self.name}: {self.num_rows:,} rows"]
        if len(self) != self.num_rows - self.num_dropped:
            parts.append(f"{len(self):,} examples")
        share = self.num_labels / self.num_tokens
        longest = self.lengths.max()
        parts.append(f"{self.num_tokens:,} tokens ({share:.0%} with a label), longest {longest:,}")
        if self.num_truncated:
            parts.append(f"{self.num_truncated:,} rows truncated to {self.max_seq_len:,} tokens")
        if self.num_dropped:
            parts.append(f"{self.num_dropped:,} rows dropped (nothing in them has a label)")
        return ", ".join(parts)


def load(
    cfg: DatasetConfig, tokenizer: Tokenizer, max_seq_len: int, *, name: str = "dataset", vocab_size: int | None = None
) -> Examples:
    """Reads and tokenises a data set.

    Args:
        cfg: where the rows are and what they look like.
        tokenizer: that of the student; teacher and student see the same ids.
        max_seq_len: positions of the longest row; longer rows are truncated (documents of the text format are cut into
            several examples instead).
        name: the section of the settings, for messages.
        vocab_size: rows of the models' embeddings; None: any id of the tokenizer will do.

    Raises:
        FileNotFoundError: nothing at cfg.source.
        ValueError: a row of the wrong shape, an id outside of the vocabulary, no rows, or none with a label.
    """
    encode = row_encoder(cfg, tokenizer, max_seq_len)
    found = rows.read(cfg.source, split=cfg.split, subset=cfg.name, separator=cfg.separator)

    def encoded() -> Iterator[Encoded]:
        bar = tqdm(found, f"tokenizing {name}", found.size(), unit=" rows", delay=2.0, leave=False, disable=None)
        for row in bar:
            try:
                examples = encode(row.columns)
            except ValueError as error:
                raise ValueError(f"{name}: {row.place}: {error}") from None
            for tokens, _ in examples:
                if vocab_size is not None and max(tokens, default=0) >= vocab_size:
                    raise ValueError(
                        f"{name}: {row.place} has the token {tokenizer.piece(max(tokens))!r} with id {max(tokens)}, "
                        f"but the models have {vocab_size} ids. Tokenizer and models do not belong together, or the "
                        "row holds a special token that they were not built with."
                    )
            yield examples

    examples = Examples.of(name, max_seq_len, encoded())
    if examples.num_rows == 0:
        raise ValueError(f"{name}: {cfg.source} has no rows" + (f" in split={cfg.split}." if cfg.split else "."))
    if len(examples) == 0:
        raise ValueError(
            f"{name}: none of the {examples.num_rows:,} rows of {cfg.source} has anything to train on: either their "
            f"answers are empty, or their prompts alone are longer than max_seq_len={max_seq_len}. Look at the "
            "rows, or raise tokenizer.max_seq_len."
        )
    return examples


def _parts(encoded: Iterable[Encoded], max_seq_len: int) -> Iterator[Part]:
    encoded = iter(encoded)
    while chunk := list(islice(encoded, _CHUNK_SIZE)):
        yield _part(chunk, max_seq_len)


def _part(encoded: Sequence[Encoded], max_seq_len: int) -> Part:
    counts = Counts()
    tokens, is_label = [np.empty(0, np.int32)], [np.empty(0, bool)]
    for row in encoded:
        counts.num_rows += 1
        was_cut, was_kept = False, False
        for row_tokens, row_is_label in row:
            # Nothing comes before the first token, so that it cannot be predicted.
            labelled = np.flatnonzero(row_is_label[1:]) + 1
            if not len(labelled):
                continue
            # max_seq_len counts inputs; the last label needs no position of its own.
            was_cut |= bool(labelled[-1] > max_seq_len)
            labelled = labelled[labelled <= max_seq_len]
            if not len(labelled):
                continue
            was_kept = True
            tokens.append(np.array(row_tokens[: labelled[-1] + 1], np.int32))
            is_label.append(np.zeros(labelled[-1] + 1, bool))
            is_label[-1][labelled] = True
        counts.num_truncated += was_cut and was_kept
        counts.num_dropped += not was_kept
    sizes = np.array([len(example) for example in tokens[1:]], np.int64)
    flat_tokens, flat_is_label = np.concatenate(tokens), np.concatenate(is_label)
    return Part(flat_tokens, flat_is_label, sizes, example_ids(flat_tokens, flat_is_label, sizes), counts)


def _join(name: str, max_seq_len: int, parts: Iterable[Part]) -> Examples:
    columns = bytearray(), bytearray(), bytearray(), bytearray()
    counts = Counts()
    for part in parts:
        for column, array in zip(columns, part[:4], strict=True):
            column += array.tobytes()
        counts.add(part.counts)
    tokens, is_label, sizes, ids = (
        np.frombuffer(column, dtype)
        for column, dtype in zip(columns, (np.int32, bool, np.int64, np.uint64), strict=True)
    )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Examples(name, max_seq_len, tokens, is_label, offsets, ids, counts)


def example_ids(tokens: np.ndarray, is_label: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[n] uint64: a hash of each example's tokens, labels and length.

    A sum of splitmix64 (Steele, Lea and Flood 2014) over (position, token, label), mixed once more: examples that
    differ in one token always differ, others are alike by a chance of 2 ** -64.

    Args:
        tokens: [t] int32, those of all examples.
        is_label: [t] bool.
        sizes: [n] int64, tokens of each example, >= 1.
    """
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    sums = np.empty(len(sizes), np.uint64)
    start = 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + _HASH_BLOCK, "right")) - 1)
        first, last = offsets[start], offsets[stop]
        positions = np.arange(last - first) - np.repeat(offsets[start:stop] - first, sizes[start:stop])
        values = positions.astype(np.uint64) << np.uint64(32)
        values |= tokens[first:last].astype(np.uint64) << np.uint64(1)
        values |= is_label[first:last]
        sums[start:stop] = np.add.reduceat(_mix(values), offsets[start:stop] - first)
        start = stop
    return _mix(sums)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
