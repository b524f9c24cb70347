"""Whatever answers "what would the teacher say here"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdtune.data import Batch
from kdtune.models import Decoder


@dataclass(frozen=True)
class Targets:
    """The teacher's next-token distributions, as the hidden states and the head that produce them.

    Attributes:
        hidden: [b, s, d_t], after the teacher's final norm.
        head: its output projection, weight [v, d_t].
    """

    hidden: Tensor
    head: nn.Linear


class LiveTeacher:
    """A frozen model that is asked during training."""

    def __init__(self, model: Decoder):
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Targets:
        return Targets(self.model.hidden(batch.tokens, batch.positions, batch.documents), self.model.head)
