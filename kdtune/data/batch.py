"""The rectangle of token ids that models see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # the label of positions that are not scored


@dataclass(frozen=True)
class Batch:
    """Token ids and what is to be predicted from each.

    Attributes:
        tokens: [b, s] int64, padded on the right.
        labels: [b, s] int64, already shifted: the token that follows, or IGNORE (prompt, padding).
        positions: [b, s] int64, from 0 in each document.
        documents: [b, s] int64, which document a token is of; -1 is padding. None: each row is one document.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; copies do not wait for the device where the host memory is pinned."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        tokens, labels, positions = (
            tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.labels, self.positions)
        )
        return Batch(tokens, labels, positions, documents)

    @property
    def num_labels(self) -> int:
        """Scored positions. Ask before `to`: on a GPU the answer waits for the device."""
        return int((self.labels != IGNORE).sum())


def count_labels(batches: Sequence[Batch]) -> int:
    """Scored positions of all of them: what the sums of an optimizer step are divided by."""
    return sum(batch.num_labels for batch in batches)


def collate(rows: Sequence[tuple[Tensor, Tensor]], pad_id: int = 0) -> Batch:
    """Pads rows on the right, to the longest of them.

    Args:
        rows: (tokens [s], labels [s]) of one document each.
        pad_id: any id of the vocabulary; attention is causal and padding has no label, so that it changes nothing.
    """
    length = max(len(tokens) for tokens, _ in rows)
    batch_tokens = torch.full((len(rows), length), pad_id, dtype=torch.int64)  # [b, s]
    batch_labels = torch.full((len(rows), length), IGNORE, dtype=torch.int64)  # [b, s]
    for i, (tokens, labels) in enumerate(rows):
        batch_tokens[i, : len(tokens)] = tokens
        batch_labels[i, : len(labels)] = labels
    positions = torch.arange(length).expand(len(rows), length)  # [b, s]
    return Batch(batch_tokens, batch_labels, positions)
