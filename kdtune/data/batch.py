"""The rectangle of token ids that models see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune import devices
from kdtune.data.ids import example_ids
from kdtune.documents import Documents

IGNORE = -100  # the label of positions that are not scored


class Keys(NamedTuple):
    """Where the scored positions of a batch come from, whatever the order, packing and slices of its rows.

    Attributes:
        examples: [t] uint64, the id of the example that each is in, as in `Examples.ids`.
        places: [t] int64, which of that example's labels it is, from 0.
    """

    examples: np.ndarray
    places: np.ndarray

    def starts(self) -> np.ndarray:
        """[n] int64, where the positions of another example begin."""
        goes_on = (self.examples[1:] == self.examples[:-1]) & (self.places[1:] == self.places[:-1] + 1)
        return np.flatnonzero(~np.append(np.zeros(min(1, len(self.places)), bool), goes_on))


@dataclass(frozen=True)
class Batch:
    """Token ids and what is to be predicted from each.

    Attributes:
        tokens: [b, s] int64, padded on the right; of a slice of rows (see `Share`), s are those that are here.
        labels: [b, s] int64, already shifted: the token that follows, or IGNORE (prompt, padding).
        positions: [b, s] int64, from 0 in each document.
        documents: where those of packed rows begin and end, in whole rows. None: each row is one document.
        scored: [t] int64, which of the b * s positions have a label. None on the host, where it is found out.
        lengths: [b] int64, how many tokens of each row there are before its padding. None: all.
        sliced_keys: of a slice of rows, finds what `keys` cannot find in a part of them. None: these are whole rows.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Documents | None = None
    scored: Tensor | None = None
    lengths: Tensor | None = None
    sliced_keys: Callable[[], Keys] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; no one waits for the copies, nor later to learn which positions are scored."""
        documents = None if self.documents is None else self.documents.to(device)
        scored = (self.labels.flatten() != IGNORE).nonzero()[:, 0] if self.scored is None else self.scored
        parts = (self.tokens, self.labels, self.positions)
        tokens, labels, positions, scored = (devices.send(part, device) for part in (*parts, scored))
        lengths = None if self.lengths is None else devices.send(self.lengths, device)
        return Batch(tokens, labels, positions, documents, scored, lengths)

    @property
    def num_labels(self) -> int:
        """Scored positions. Ask before `to`: on a GPU the answer waits for the device."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        """Positions that are no padding. Ask before `to`."""
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())

    def keys(self) -> Keys:
        """Of the scored positions, in their order. Ask before `to`."""
        if self.sliced_keys is not None:
            return self.sliced_keys()
        b, s = self.tokens.shape
        lengths = [[s]] * b if self.documents is None else self.documents.rows
        tokens, is_label, places = [np.empty(0, np.int32)], [np.empty(0, bool)], [np.empty(0, np.int64)]
        for row_tokens, row_labels, row in zip(self.tokens.numpy(), self.labels.numpy(), lengths, strict=True):
            start = 0
            for length in row:
                labels = row_labels[start : start + length]
                labelled = np.flatnonzero(labels != IGNORE)
                if len(labelled):  # an example ends with its last label
                    stop = labelled[-1] + 1
                    tokens.append(np.append(row_tokens[start : start + stop], labels[stop - 1]).astype(np.int32))
                    is_label.append(np.append(False, labels[:stop] != IGNORE))
                    places.append(np.arange(len(labelled)))
                start += length
        sizes = np.array([len(example) for example in tokens[1:]], np.int64)
        ids = example_ids(np.concatenate(tokens), np.concatenate(is_label), sizes)
        counts = [len(example) for example in places[1:]]
        return Keys(np.repeat(ids, counts), np.concatenate(places))


@dataclass(frozen=True)
class Share:
    """What a process gets of the rows of a step.

    Attributes:
        rank: which of those among whom the rows are dealt out it is; every row goes to one of them.
        num_ranks: how many they are.
        slice: which of its rows' equal slices it gets; those with the others have the same rank.
        num_slices: how many they are.
        is_scored: whether it computes the loss; the other stages of a pipeline get the rows without labels.
    """

    rank: int = 0
    num_ranks: int = 1
    slice: int = 0
    num_slices: int = 1
    is_scored: bool = True

    def of(self, rows: Batch) -> Batch:
        """Its slice of its rows, on the host: [b, ceil(s / n)], with the documents of the whole rows.

        Labels are shifted before, so that each token, also the last of a slice, has the label that it has in its row.
        """
        if not self.is_scored:
            rows = replace(rows, labels=torch.full_like(rows.labels, IGNORE))
        if self.num_slices == 1:
            return rows
        length = -(-rows.tokens.size(1) // self.num_slices)
        excess = length * self.num_slices - rows.tokens.size(1)
        tokens, labels = F.pad(rows.tokens, (0, excess)), F.pad(rows.labels, (0, excess), value=IGNORE)
        documents = rows.documents
        if documents is None:
            positions = torch.arange(tokens.size(1)).expand_as(tokens)
        else:
            documents = Documents.in_rows(documents.rows, tokens.size(1))
            positions = documents.positions()
        here = slice(self.slice * length, (self.slice + 1) * length)

        def keys() -> Keys:
            is_here = torch.zeros_like(rows.labels, dtype=torch.bool)
            is_here[:, here] = True
            mine, all_keys = is_here[rows.labels != IGNORE].numpy(), rows.keys()
            return Keys(all_keys.examples[mine], all_keys.places[mine])

        ends = torch.full((len(tokens),), rows.tokens.size(1)) if rows.lengths is None else rows.lengths
        lengths = (ends - self.slice * length).clamp(0, length)
        return Batch(tokens[:, here], labels[:, here], positions[:, here], documents, None, lengths, keys)


ALL = Share()  # of a process that is alone


def count_labels(batches: Sequence[Batch]) -> int:
    """Scored positions of all of them: what the sums of an optimizer step are divided by."""
    return sum(batch.num_labels for batch in batches)


def count_tokens(batches: Sequence[Batch]) -> int:
    """Positions of all of them that are no padding."""
    return sum(batch.num_tokens for batch in batches)


Example = tuple[Tensor, Tensor]  # tokens [s], labels [s]


def collate(rows: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pads rows on the right, to the longest of them.

    Args:
        rows: one document each.
        pad_id: any id of the vocabulary; attention is causal and padding has no label, so that it changes nothing.
    """
    tokens, labels = (_pad([row[part] for row in rows], fill) for part, fill in ((0, pad_id), (1, IGNORE)))
    positions = torch.arange(tokens.size(1)).expand_as(tokens)  # [b, s]
    return Batch(tokens, labels, positions, lengths=torch.tensor([len(row) for row, _ in rows]))


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int = 0) -> Batch:
    """Rows of several documents, each of which is to see itself alone, padded on the right to the longest row.

    Labels are those that each document has alone, so that none is of its neighbour.

    Args:
        rows: of each the documents, one after the other.
        pad_id: any id of the vocabulary.
    """
    tokens, labels = (
        _pad([torch.cat([document[part] for document in row]) for row in rows], fill)
        for part, fill in ((0, pad_id), (1, IGNORE))
    )
    documents = Documents.in_rows([len(tokens) for tokens, _ in row] for row in rows)
    lengths = torch.tensor([sum(map(len, (tokens for tokens, _ in row))) for row in rows])
    return Batch(tokens, labels, documents.positions(), documents, lengths=lengths)


def without_labels(packed: bool) -> Batch:
    """A batch that teaches nothing, for a rank that has no row left in a step: all ranks must go through the model."""
    nothing = (torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE))
    batch = collate_packed([[nothing]]) if packed else collate([nothing])
    return replace(batch, lengths=torch.zeros(1, dtype=torch.int64))


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    """[b, s], filled up with `value` on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
