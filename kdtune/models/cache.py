"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values by layer and row; a token's slot is its position, so rows of uneven length need no left padding.

    The first forward fills slots 0 to s - 1 of every row; what right padding left there is overwritten when the row
    arrives at that position, and is never seen before. Later forwards must say the positions of their tokens.
    """

    def __init__(self, max_seq_len: int) -> None:
        self._slots = max_seq_len
        # [b, slots, h, n] of each layer, made when its first keys come: the heads that are here, wherever they are.
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.length = 0  # slots in use by the longest row
        self._positions: Tensor | None = None

    def begin(self, num_tokens: int, positions: Tensor | None) -> None:
        """Announce a forward of `num_tokens` per row; `positions` [b, s] are their slots, None for the first one."""
        assert (positions is None) == (self.length == 0), "only the first forward has no positions"
        self._positions = positions
        self.length += num_tokens

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows, of which one may come several times: each as far as it is now."""
        for kept in (self.keys, self.values):
            for layer, heads in kept.items():
                kept[layer] = heads[torch.tensor(rows, device=heads.device)]

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep [b, h, s, n] of one layer and return all that its queries may look at, [b, h, slots, n]."""
        if self._positions is None:
            b, h, _, n = keys.shape
            self.keys[layer] = keys.new_zeros(b, self._slots, h, n)
            self.values[layer] = values.new_zeros(b, self._slots, h, n)
            self.keys[layer][:, : self.length] = keys.transpose(1, 2)
            self.values[layer][:, : self.length] = values.transpose(1, 2)
            return keys, values
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        self.keys[layer][rows, self._positions] = keys.transpose(1, 2)
        self.values[layer][rows, self._positions] = values.transpose(1, 2)
        return (
            self.keys[layer][:, : self.length].transpose(1, 2),
            self.values[layer][:, : self.length].transpose(1, 2),
        )
