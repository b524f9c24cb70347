"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtune.models.config import ModelConfig


class KVCache:
    """Keys and values by layer and row; a token's slot is its position, so rows of uneven length need no left padding.

    The first forward fills slots 0 to s - 1 of every row; what right padding left there is overwritten when the row
    arrives at that position, and is never seen before. Later forwards must say the positions of their tokens.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_seq_len: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, max_seq_len, config.num_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.length = 0  # slots in use by the longest row
        self._positions: Tensor | None = None

    def begin(self, num_tokens: int, positions: Tensor | None) -> None:
        """Announce a forward of `num_tokens` per row; `positions` [b, s] are their slots, None for the first one."""
        assert (positions is None) == (self.length == 0), "only the first forward has no positions"
        self._positions = positions
        self.length += num_tokens

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep [b, h, s, n] of one layer and return all that its queries may look at, [b, h, slots, n]."""
        if self._positions is None:
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
