"""A look at what a run reads: rows token by token, and the numbers of an epoch."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdtune.data.batch import IGNORE, Batch, count_labels
from kdtune.data.blend import Blend
from kdtune.data.examples import UNKNOWN, Examples
from kdtune.data.ids import example_ids
from kdtune.data.rows import Row as SourceRow
from kdtune.tokenizers import Tokenizer


@dataclass(frozen=True)
class Token:
    """What one id stands for; or several, where a character is spread over them."""

    text: str  # as it is: anything may be in it
    ids: tuple[int, ...]
    is_label: bool  # it is to be predicted
    is_special: bool


@dataclass(frozen=True)
class Document:
    """One document of a row: all of the row, unless rows are packed."""

    tokens: list[Token]  # the last may be a label only, which is predicted and no input
    length: int  # positions
    num_labels: int
    origin: str  # "line 12 of train.jsonl", or if it is of several rows "example 12"; "": not known


@dataclass(frozen=True)
class Row:
    """A row of a batch, without its padding, and where it stands, from 1."""

    number: int  # among all rows that are dealt out
    place: str  # "step 1, micro-batch 1", or "batch 1" of a validation
    documents: list[Document]


@dataclass
class Survey:
    """Batches, counted; and some of their rows."""

    rows: list[Row] = field(default_factory=list)
    is_packed: bool = False
    num_rows: int = 0
    num_documents: int = 0
    num_tokens: int = 0  # positions that are no padding
    num_positions: int = 0  # of all the rectangles
    labels_per_step: list[int] = field(default_factory=list)


def survey(
    steps: Iterable[Sequence[Batch]],
    examples: Examples | Blend,
    tokenizer: Tokenizer,
    *,
    start: int,
    num_rows: int,
    is_val: bool,
) -> Survey:
    """Goes through batches, and spells out the rows `start` to `start + num_rows - 1`, counted from 1.

    Args:
        steps: micro-batches of each; of a validation, one batch each.
        examples: what they were made of.
        tokenizer: to spell the rows.
        start: the first row to spell.
        num_rows: how many.
        is_val: the batches are those of a validation.
    """
    found = Survey()
    shown: list[tuple[int, str, list[_Example]]] = []
    for step, micro_batches in enumerate(steps, start=1):
        found.labels_per_step.append(count_labels(micro_batches))
        for number, batch in enumerate(micro_batches, start=1):
            documents = _documents(batch)
            found.is_packed |= batch.documents is not None
            for i, lengths in enumerate(documents):
                if start <= found.num_rows + i + 1 < start + num_rows:
                    place = f"batch {step:,}" if is_val else f"step {step:,}, micro-batch {number:,}"
                    parts = (part[i, : sum(lengths)].split(lengths) for part in (batch.tokens, batch.labels))
                    shown.append((found.num_rows + i + 1, place, list(map(_example, *parts))))
            found.num_rows += len(documents)
            found.num_documents += sum(map(len, documents))
            found.num_tokens += sum(map(sum, documents))
            found.num_positions += batch.tokens.numel()
    origins = _origins(examples, {example.own for *_, row in shown for example in row})
    known = frozenset(tokenizer.ids())
    for number, place, row in shown:
        spelled = [
            Document(
                list(spell(one.ids, one.is_label, tokenizer, known)),
                one.length,
                sum(one.is_label),
                origins.get(one.own, ""),
            )
            for one in row
        ]
        found.rows.append(Row(number, place, spelled))
    return found


def _documents(batch: Batch) -> list[list[int]]:
    """Tokens of each document, row by row. A row that is not packed ends with its last label."""
    if batch.documents is not None:
        return batch.documents.rows
    ends = (batch.labels != IGNORE) * torch.arange(1, batch.labels.size(1) + 1)  # [b, s]
    return [[length] if length else [] for length in ends.amax(1).tolist()]


class _Example(NamedTuple):
    """A document as it is in `Examples`."""

    ids: list[int]  # the last may be a label only
    is_label: list[bool]
    length: int  # positions
    own: int  # its id


def _example(tokens: Tensor, labels: Tensor) -> _Example:
    ids = tokens.tolist()
    is_label = [False, *(labels != IGNORE).tolist()]  # nothing predicts the first token
    if is_label[-1]:
        ids.append(int(labels[-1]))
    is_label = is_label[: len(ids)]
    (own,) = example_ids(np.array(ids, np.int32), np.array(is_label), np.array([len(ids)]))
    return _Example(ids, is_label, len(tokens), int(own))


def _origins(examples: Examples | Blend, wanted: set[int]) -> dict[int, str]:
    """Where examples are from, by their ids: the row, and of a blend the source. What is not known is absent."""
    origins: dict[int, str] = {}
    for name, source in examples.sources.items() if isinstance(examples, Blend) else [("", examples)]:
        indices = np.flatnonzero(np.isin(source.ids, np.array(sorted(wanted), np.uint64)))
        _, first = np.unique(source.ids[indices], return_index=True)  # of those that are alike
        indices = indices[first].tolist()
        numbers = {int(source.rows[i]) for i in indices} - {UNKNOWN}
        rows = source.source.find(numbers) if source.source is not None and numbers else {}
        for i in indices:
            place = _place(source, i, rows.get(int(source.rows[i])))
            origins.setdefault(int(source.ids[i]), f"{name}, {place}" if name else place)
    return origins


def _place(examples: Examples, i: int, row: SourceRow | None) -> str:
    if row is None:
        return f"example {i + 1:,}"
    first, behind = (int(np.searchsorted(examples.rows, examples.rows[i], side)) for side in ("left", "right"))
    part = f", example {i - first + 1:,} of {behind - first:,}" if behind - first > 1 else ""
    return f"{row.unit} {row.number:,} of {Path(row.source).name}{part}"


def spell(ids: Sequence[int], is_label: Sequence[bool], tokenizer: Tokenizer, known: frozenset[int]) -> Iterator[Token]:
    """Tokens as text. Those that hold parts of one character stand together; parts that make none show as bytes.

    Args:
        ids: of a document.
        is_label: whether each is to be predicted.
        tokenizer: theirs.
        known: `tokenizer.ids()`; others show as numbers.
    """
    waiting: list[int] = []  # ids that end inside a character, all with a label or all without
    label = False

    def broken() -> Iterator[Token]:
        for id in waiting:
            yield Token(tokenizer.piece_bytes(id).decode(errors="backslashreplace"), (id,), label, False)
        waiting.clear()

    for id, is_labelled in zip(ids, is_label, strict=True):
        is_special = id in tokenizer.special_ids or id not in known
        if is_special or is_labelled != label or _decode(tokenizer, [*waiting, id]) is None:
            yield from broken()
        label = is_labelled
        if is_special:
            yield Token(tokenizer.piece(id) if id in known else f"<id {id}>", (id,), label, True)
            continue
        waiting.append(id)
        text = _decode(tokenizer, waiting)
        if text is None:
            yield from broken()
        elif text:
            yield Token(text, tuple(waiting), label, False)
            waiting.clear()
    yield from broken()


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """The text of ids; "" if it ends inside a character, None if no text begins so."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(b"".join(map(tokenizer.piece_bytes, ids)))
    except UnicodeDecodeError:
        return None
    return "" if decoder.getstate()[0] else text


@dataclass(frozen=True)
class Bin:
    """Examples of `first` to `last` positions, both included."""

    first: int
    last: int
    count: int


def histogram(lengths: np.ndarray, max_seq_len: int, num_bins: int = 15) -> list[Bin]:
    """Bins of one round width, the outer two cut to the smallest length and to `max_seq_len`, which none is above."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    widths = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    width = next(width for width in widths if (longest - 1) // width - (shortest - 1) // width < num_bins)
    first = (shortest - 1) // width
    counts = np.bincount((lengths - 1) // width - first)
    return [
        Bin(max(i * width + 1, shortest), min((i + 1) * width, max(longest, max_seq_len)), count)
        for i, count in enumerate(counts.tolist(), start=first)
    ]
