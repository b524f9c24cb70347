"""What fills the weights of a model that is being loaded: the files of a folder, or a generator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdtune.checkpoint.adapters import Adapter
from kdtune.checkpoint.weights import PIECE, StoredTensor, read_fp8, read_into
from kdtune.models import stored_fp8


@dataclass(frozen=True)
class Source:
    """What fills the weights of a model."""

    stored: Mapping[str, StoredTensor]  # by their names in the folder; empty: weights are drawn
    adapter: Adapter | None  # merged into them
    keep_layers: Sequence[int] | None
    standard_deviation: float  # of weights that are drawn
    generator: torch.Generator
    buffer: Tensor = field(default_factory=lambda: torch.empty(PIECE, dtype=torch.uint8))

    def fill(self, name: str, weight: Tensor) -> None:
        """All of it."""
        if not self.stored:
            _draw(name, weight, self.standard_deviation, self.generator)
        elif self._is_merged(name):
            assert self.adapter is not None
            self.adapter.read_merged(self._original(name), self._stored(name), weight, self.buffer)
        else:
            read_into(self._stored(name), weight, self.buffer)

    def fill_part(self, name: str, part: Tensor, place: Sequence[slice], shape: Sequence[int]) -> None:
        """What a process holds of a weight of this shape; rows of a larger vocabulary are 0."""
        there = tuple(slice(*of.indices(size)[:2]) for of, size in zip(place, shape, strict=True))
        count = max(0, there[0].stop - there[0].start)
        part[count:].zero_()
        part = part[:count]
        if self.stored and self._stored(name).scale is None and not self._is_merged(name):
            read_into(self._stored(name).part(*there), part, self.buffer)
        else:  # it is made as a whole, on the host
            weight = torch.empty(tuple(shape), dtype=part.dtype)
            self.fill(name, weight)
            part.copy_(weight[there])

    def is_fp8(self, name: str) -> bool:
        """Whether it may stay as it is stored."""
        return bool(self.stored) and self._stored(name).is_fp8 and not self._is_merged(name)

    def fp8(self, name: str, like: Tensor) -> Tensor:
        """It, as it is stored."""
        return stored_fp8(*read_fp8(self._stored(name), like.device, self.buffer), like.dtype)

    def _original(self, name: str) -> str:
        return _name_in_folder(name, self.keep_layers)

    def _stored(self, name: str) -> StoredTensor:
        original = self._original(name)
        return self.stored[original if original in self.stored else "model.embed_tokens.weight"]  # a head that was tied

    def _is_merged(self, name: str) -> bool:
        return self.adapter is not None and self.adapter.changes(self._original(name))


def _name_in_folder(name: str, keep_layers: Sequence[int] | None) -> str:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if keep_layers is None or match is None:
        return name
    return f"model.layers.{keep_layers[int(match[1])]}.{name[match.end() :]}"


def _draw(name: str, weight: Tensor, standard_deviation: float, generator: torch.Generator) -> None:
    if name.endswith(".bias"):
        weight.zero_()
    elif weight.dim() == 1:  # of a norm
        weight.fill_(1)
    else:
        # In float32 on the CPU whatever the target, so that every dtype and device starts from the same numbers.
        for piece in weight.view(-1).split(PIECE // 4):
            piece.copy_(torch.empty(piece.shape).normal_(0.0, standard_deviation, generator=generator))
