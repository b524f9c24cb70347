"""A tokenised data set, held compactly."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from kdtune.data.batch import IGNORE
from kdtune.data.ids import example_ids
from kdtune.data.rows import Rows

TooLong = Literal["truncate", "split", "drop"]
Encoded = Sequence[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]]

NUM_PLACES = 5  # skipped rows that are told one by one
UNKNOWN = -1  # the row of an example that is of several
_MUCH = 0.1  # share of the rows that makes a warning of what was lost or truncated


@dataclass
class Counts:
    """What became of the rows."""

    num_rows: int = 0  # read
    num_labels: int = 0  # tokens to be predicted
    max_id: int = 0  # the largest in them, before they were cut
    num_truncated: int = 0  # rows longer than max_seq_len, of which the beginning is left
    num_split: int = 0  # rows longer than max_seq_len, cut into several examples
    num_too_long: int = 0  # rows longer than max_seq_len, left out as far as they were
    num_prompt_too_long: int = 0  # rows that begin with more than max_seq_len tokens of which none is to be predicted
    num_unlabelled: int = 0  # rows without anything to predict
    skipped: dict[str, int] = field(default_factory=dict)  # kind of trouble -> rows that could not be used
    places: list[str] = field(default_factory=list)  # of the first of them, with what was wrong

    def add(self, other: Counts) -> None:
        self.num_rows += other.num_rows
        self.num_labels += other.num_labels
        self.max_id = max(self.max_id, other.max_id)
        self.num_truncated += other.num_truncated
        self.num_split += other.num_split
        self.num_too_long += other.num_too_long
        self.num_prompt_too_long += other.num_prompt_too_long
        self.num_unlabelled += other.num_unlabelled
        for kind, count in other.skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + count
        self.places = (self.places + other.places)[:NUM_PLACES]

    def skip(self, kind: str, message: str) -> None:
        """Counts a row that cannot be used."""
        self.add(Counts(num_rows=1, skipped={kind: 1}, places=[message]))

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def num_lost(self) -> int:
        """Rows that made no example."""
        return self.num_too_long + self.num_prompt_too_long + self.num_unlabelled + self.num_skipped

    def reasons(self) -> str:
        """How many rows were lost for what."""
        reasons = {
            "longer than max_seq_len": self.num_too_long,
            "prompt alone longer than max_seq_len": self.num_prompt_too_long,
            "nothing to predict": self.num_unlabelled,
            **dict(sorted(self.skipped.items())),
        }
        return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)

    def warn(self, name: str, max_seq_len: int) -> None:
        """Warns where much of a set is not learned as it was written.

        Args:
            name: which data set this is.
            max_seq_len: the limit that was applied.
        """
        if self.num_lost + self.num_truncated <= _MUCH * self.num_rows:
            return
        fates = (
            (self.num_lost, f"are lost ({self.reasons()})"),
            (self.num_truncated, f"are truncated to {max_seq_len:,} tokens"),
        )
        told = " and ".join(f"{number / self.num_rows:.1%} {fate}" for number, fate in fates if number)
        is_length = self.num_truncated + self.num_too_long + self.num_prompt_too_long
        advice = "Look at them" + ", or raise tokenizer.max_seq_len" * bool(is_length)
        warnings.warn(f"{name}: of its rows {told}. {advice}.", stacklevel=2)


def counted(number: int, noun: str) -> str:
    """The number with its noun: 1 row, 2 rows."""
    return f"{number:,} {noun}" + "s" * (number != 1)


class Part(NamedTuple):
    """The examples of some rows, one behind the other."""

    tokens: np.ndarray  # [t] int32
    is_label: np.ndarray  # [t] bool: this token is to be predicted
    sizes: np.ndarray  # [n] int64: tokens of each example
    ids: np.ndarray  # [n] uint64
    rows: np.ndarray  # [n] int64: the row that each example is of, from 0
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
        rows: [n] int64, the row that each example is of, from 0 as they were read; UNKNOWN if it is of several.
        counts: what became of the rows that were read.
        source: where the rows can be found again; None: nowhere.
    """

    def __init__(
        self,
        name: str,
        max_seq_len: int,
        tokens: np.ndarray,
        is_label: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        rows: np.ndarray,
        counts: Counts,
    ) -> None:
        self.name = name
        self.max_seq_len = max_seq_len
        self.tokens, self.is_label, self.offsets, self.ids, self.rows = tokens, is_label, offsets, ids, rows
        self.counts = counts
        self.source: Rows | None = None

    @classmethod
    def of(cls, name: str, max_seq_len: int, encoded: Iterable[Encoded]) -> Examples:
        """Of encoded rows: each a list of (tokens, whether each token is to be predicted)."""
        builder = PartBuilder(max_seq_len)
        for row in encoded:
            builder.add(row)
        return join(name, max_seq_len, [builder.finish()])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        start, stop = self.offsets[i], self.offsets[i + 1]
        tokens = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
        is_label = torch.from_numpy(self.is_label[start + 1 : stop].astype(bool))
        return tokens[:-1], torch.where(is_label, tokens[1:], IGNORE)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[n] int64, positions of each example."""
        return np.diff(self.offsets) - 1

    @cached_property
    def label_counts(self) -> np.ndarray:
        """[n] int64, scored positions of each example."""
        return np.add.reduceat(self.is_label, self.offsets[:-1], dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Rows read; len() is smaller where rows were dropped, greater where a row makes several examples."""
        return self.counts.num_rows

    @property
    def num_tokens(self) -> int:
        """Positions of all examples together, without padding."""
        return len(self.tokens) - len(self)

    @property
    def num_labels(self) -> int:
        """Scored positions of all examples together."""
        return self.counts.num_labels

    @cached_property
    def fingerprint(self) -> int:
        """Changes when any token, label or border does: a resumed run checks that it reads the same data."""
        return zlib.crc32(self.ids.tobytes())

    def order(self, epoch: int, seed: int | None) -> np.ndarray:
        """The order in which an epoch, from 0, has them: [n] int64; without a seed as they were read."""
        if seed is None:
            return np.arange(len(self))
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def summary(self) -> str:
        """One line: how much there is, and what was cut, dropped or skipped."""
        counts = self.counts
        parts = [f"{self.name}: {counted(self.num_rows, 'row')}"]
        if len(self) != self.num_rows - counts.num_lost:
            parts.append(counted(len(self), "example"))
        share = self.num_labels / self.num_tokens
        longest = self.lengths.max()
        parts.append(f"{self.num_tokens:,} tokens ({share:.0%} with a label), longest {longest:,}")
        fates = (
            (counts.num_truncated, f"truncated to {self.max_seq_len:,} tokens"),
            (counts.num_split, f"split into examples of {self.max_seq_len:,} tokens"),
            (counts.num_lost, f"lost ({'; the first skipped: '.join([counts.reasons(), *counts.places[:1]])})"),
        )
        return ", ".join(parts + [f"{counted(number, 'row')} {fate}" for number, fate in fates if number])


@final
class PartBuilder:
    """Collects the examples of some rows, cut to length."""

    def __init__(self, max_seq_len: int, too_long: TooLong = "truncate") -> None:
        self.counts = Counts()
        self._max_seq_len = max_seq_len
        self._too_long = too_long
        self._tokens = [np.empty(0, np.int32)]
        self._is_label = [np.empty(0, bool)]
        self._rows: list[int] = []

    def add(self, encoded: Encoded) -> None:
        """Takes the examples that one row makes: (tokens, whether each is to be predicted)."""
        was_long, num_before = False, len(self._rows)
        for row_tokens, row_is_label in encoded:
            tokens, is_label = np.asarray(row_tokens, np.int32), np.array(row_is_label, bool)
            is_label[:1] = False  # nothing comes before the first token, so that it cannot be predicted
            labelled = np.flatnonzero(is_label)
            # max_seq_len counts inputs; the last label needs no position of its own.
            was_long |= bool(len(labelled) and labelled[-1] > self._max_seq_len)
            for start, stop in _pieces(labelled, self._max_seq_len, self._too_long):
                self._rows.append(self.counts.num_rows)
                self._tokens.append(tokens[start:stop])
                self._is_label.append(is_label[start:stop].copy())
                self._is_label[-1][0] = False
        counts = self.counts
        counts.num_rows += 1
        if was_long and self._too_long == "drop":
            counts.num_too_long += 1
        elif len(self._rows) == num_before and was_long:
            counts.num_prompt_too_long += 1
        elif len(self._rows) == num_before:
            counts.num_unlabelled += 1
        elif was_long and self._too_long == "split":
            counts.num_split += 1
        elif was_long:
            counts.num_truncated += 1

    def finish(self) -> Part:
        sizes = np.array([len(example) for example in self._tokens[1:]], np.int64)
        tokens, is_label = np.concatenate(self._tokens), np.concatenate(self._is_label)
        self.counts.num_labels = int(np.count_nonzero(is_label))
        ids = example_ids(tokens, is_label, sizes)
        return Part(tokens, is_label, sizes, ids, np.array(self._rows, np.int64), self.counts)


def _pieces(labelled: np.ndarray, max_seq_len: int, too_long: TooLong) -> Iterator[tuple[int, int]]:
    """Where the examples of one text begin and end: each ends with a label.

    Args:
        labelled: [t] indices of the tokens to be predicted, ascending, none of them 0.
        max_seq_len: inputs of an example.
        too_long: what to do with more.
    """
    if not len(labelled):
        return
    last = int(labelled[-1])
    if last > max_seq_len and too_long == "drop":
        return
    # The last token of a piece is only predicted there and is the first input of the next: none is lost at a cut.
    for start in range(0, last if too_long == "split" else 1, max_seq_len):
        behind = int(np.searchsorted(labelled, start + max_seq_len, "right"))
        if behind and labelled[behind - 1] > start:
            yield start, int(labelled[behind - 1]) + 1


def join_documents(parts: Iterable[Part], max_seq_len: int) -> Iterator[Part]:
    """Puts documents one behind the other and cuts the whole into examples of max_seq_len inputs.

    Args:
        parts: whole documents; what is between them in `parts` makes no difference.
        max_seq_len: inputs of an example.
    """
    tokens, is_label = np.empty(0, np.int32), np.empty(0, bool)
    for part in parts:
        tokens, is_label = np.concatenate([tokens, part.tokens]), np.concatenate([is_label, part.is_label])
        end = max(0, len(tokens) - 1) // max_seq_len * max_seq_len
        yield _cut_joined(tokens[: end + 1], is_label[: end + 1], max_seq_len, part.counts)
        tokens, is_label = tokens[end:], is_label[end:]
    yield _cut_joined(tokens, is_label, max_seq_len, Counts())


def _cut_joined(tokens: np.ndarray, is_label: np.ndarray, max_seq_len: int, counts: Counts) -> Part:
    builder = PartBuilder(max_seq_len, "split")
    builder.add([(tokens, is_label)])
    part = builder.finish()
    rows = np.full_like(part.rows, UNKNOWN)
    return part._replace(rows=rows, counts=replace(counts, num_labels=part.counts.num_labels))


def whole_documents(encoded: Sequence[Encoded], counts: Counts) -> Part:
    """Documents as they are, for `join_documents`."""
    documents = [document for row in encoded for document in row]
    counts.num_rows += len(encoded)
    counts.num_unlabelled += sum(not row for row in encoded)
    tokens = [np.empty(0, np.int32), *(np.asarray(tokens, np.int32) for tokens, _ in documents)]
    is_label = [np.empty(0, bool), *(np.asarray(is_label, bool) for _, is_label in documents)]
    sizes = np.array([len(document) for document in tokens[1:]], np.int64)
    nothing = np.empty(0, np.uint64), np.empty(0, np.int64)  # ids and rows are those of the examples that come of it
    return Part(np.concatenate(tokens), np.concatenate(is_label), sizes, *nothing, counts)


def number_rows(parts: Iterable[Part]) -> Iterator[Part]:
    """Counts the rows of examples through all parts, instead of from 0 in each."""
    num_rows = 0
    for part in parts:
        yield part._replace(rows=np.where(part.rows == UNKNOWN, UNKNOWN, part.rows + num_rows))
        num_rows += part.counts.num_rows


def join(name: str, max_seq_len: int, parts: Iterable[Part]) -> Examples:
    """All parts in memory."""
    dtypes = np.int32, bool, np.int64, np.uint64, np.int64
    columns = [bytearray() for _ in dtypes]
    counts = Counts()
    for part in parts:
        for column, array in zip(columns, part[:5], strict=True):
            column += array.tobytes()
        counts.add(part.counts)
    tokens, is_label, sizes, ids, rows = (
        np.frombuffer(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)
    )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Examples(name, max_seq_len, tokens, is_label, offsets, ids, rows, counts)
