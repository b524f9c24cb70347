"""Where the documents of packed rows begin and end: data writes it, attention reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from kdtune import devices


@dataclass(frozen=True)
class Documents:
    """The documents in the rows of a batch, each of which is to see itself alone.

    It is made with the batch, on the host, and holds all that attention asks for, so that no forward waits for the
    device to tell where a document ends. There, all rows are one sequence, row behind row.

    Attributes:
        rows: tokens of each document, row by row. What is left of a row behind them is padding.
        row_length: s, which no row is longer than.
        starts: [n + 1] int32: where each of `lengths` begins among the b * s tokens, and the end.
    """

    rows: list[list[int]]
    row_length: int
    starts: Tensor

    @classmethod
    def in_rows(cls, rows: Iterable[Iterable[int]], row_length: int | None = None) -> Documents:
        """From the tokens of each document, row by row, in rows of `row_length`; None: of the longest row's."""
        lengths = [list(row) for row in rows]
        if row_length is None:
            row_length = max(map(sum, lengths))
        starts = torch.tensor([0, *accumulate(_with_padding(lengths, row_length))], dtype=torch.int32)
        return cls(lengths, row_length, starts)

    @cached_property
    def lengths(self) -> list[int]:
        """[n]: tokens of each document and of the padding behind those of a row; b * s together."""
        return _with_padding(self.rows, self.row_length)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest, or of the longest padding."""
        return max(self.lengths)

    def to(self, device: torch.device | str) -> Documents:
        """With `starts` on `device`; no one waits for the copy."""
        return replace(self, starts=devices.send(self.starts, device))

    def positions(self) -> Tensor:
        """[b, s] int64, counted from 0 in each document."""
        index = torch.arange(len(self.rows) * self.row_length, device=self.starts.device)
        return index.view(-1, self.row_length) - self._spread(self.starts[:-1])

    def lengths_of_tokens(self) -> Tensor:
        """[b, s] int64: how long the document of each token is."""
        return self._spread(self.starts.diff())

    def _spread(self, values: Tensor) -> Tensor:
        """[n] to [b, s]: that of its document for each token."""
        num_tokens = len(self.rows) * self.row_length  # which the device would be asked for otherwise
        spread = values.long().repeat_interleave(self.starts.diff(), output_size=num_tokens)
        return spread.view(-1, self.row_length)


def _with_padding(rows: list[list[int]], row_length: int) -> list[int]:
    return [length for row in rows for length in (*row, row_length - sum(row)) if length]
