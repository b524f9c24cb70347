"""Several documents in a row, so that hardly a position is padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

# Documents that are looked at together. More fill no better (docs/data.md) and would move documents farther from their
# place in the order; the last row of each window is filled by chance.
WINDOW = 16_384


@final
@dataclass(frozen=True)
class RowPlan:
    """Rows of indices, flat: a million of them are two arrays.

    Attributes:
        indices: int64, of all rows one after the other.
        starts: int64, one more than rows: where each begins in `indices`, and the end.
    """

    indices: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.indices[self.starts[row] : self.starts[row + 1]]

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Positions of each row, where index i stands for lengths[i] of them."""
        ends = np.concatenate([[0], np.cumsum(lengths[self.indices], dtype=np.int64)])
        return np.diff(ends[self.starts])

    @classmethod
    def of_one(cls, indices: np.ndarray) -> RowPlan:
        """A row for each index."""
        return cls(indices, np.arange(len(indices) + 1))


def pack(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> RowPlan:
    """First-fit decreasing (Johnson 1973) within each `window` of consecutive documents.

    The longest document first, each goes into the first row that has room for it. As documents of one length follow
    each other, the first row with room takes all that fit before the second takes any: rows are filled with as many
    array operations as there are lengths, and not one by one.

    Args:
        lengths: positions of each document, 1 to `capacity`, in the order of the epoch.
        capacity: positions of a row.
        window: documents that may share rows; a document stays within its window.

    Returns:
        Each index once. In a row, indices ascend; rows are in the order of their longest documents in `lengths`, which
        says nothing about lengths if that order does not.

    Raises:
        ValueError: a document that no row can hold.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        wrong = int(np.argmax((lengths < 1) | (lengths > capacity)))
        raise ValueError(f"example {wrong} has {lengths[wrong]:,} positions, and rows have 1 to {capacity:,}.")
    indices, sizes = [], []
    for start in range(0, len(lengths), window):
        part = lengths[start : start + window]
        row_of, num_rows = _first_fit_decreasing(part, capacity)
        # Of each row its longest document, the earliest of those: in this order the rows go.
        by_length = np.argsort(-part, kind="stable")
        _, first = np.unique(row_of[by_length], return_index=True)
        rank = np.empty(num_rows, np.int64)
        rank[np.argsort(by_length[first])] = np.arange(num_rows)
        row_of = rank[row_of]
        indices.append(start + np.argsort(row_of, kind="stable"))
        sizes.append(np.bincount(row_of, minlength=num_rows))
    starts = np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64)
    return RowPlan(np.concatenate(indices) if indices else np.empty(0, np.int64), starts)


def _first_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each document, and how many rows there are."""
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    rows, room = np.empty(0, np.int64), np.empty(0, np.int64)  # rows that can still take something, and how much
    num_rows = placed = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        fits = np.cumsum(room // size)  # documents of this size that the rows up to each can take
        old = int(np.searchsorted(fits, count))  # rows before the one that takes the last of them
        takes = np.diff(fits[: old + 1], prepend=0)
        if old < len(rows):
            takes[-1] -= fits[old] - count
        else:  # what is left opens new rows
            left = count - (int(fits[-1]) if len(fits) else 0)
            opened, per_row = -(-left // (capacity // size)), capacity // size
            rows = np.concatenate([rows, np.arange(num_rows, num_rows + opened)])
            room = np.concatenate([room, np.full(opened, capacity)])
            takes = np.concatenate([takes, np.full(opened, per_row)])
            takes[-1] -= opened * per_row - left
            num_rows += opened
        row_of[order[placed : placed + count]] = np.repeat(rows[: len(takes)], takes)
        room[: len(takes)] -= takes * size
        placed += count
        open_rows = room >= sizes[0]
        rows, room = rows[open_rows], room[open_rows]
    return row_of, num_rows
