"""Whatever answers "what would the teacher say here"."""

from __future__ import annotations

import math

import torch

from kdtune.data import Batch
from kdtune.losses import Targets
from kdtune.models import Decoder


class LiveTeacher:
    """A frozen model that is asked during training."""

    def __init__(self, model: Decoder):
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Targets:
        return Targets(self.model.hidden(batch.tokens, batch.positions, batch.documents), self.model.head)

    def judge(self, ce: float, source: str) -> str:
        """In words, what the teacher's cross-entropy of some text says about its weights.

        A teacher that was loaded wrongly teaches noise, and no loss would show it.

        Args:
            ce: in nats per token.
            source: where the weights came from, to name it.

        Returns:
            The cross-entropy beside that of a uniform guess, and a warning if it is hardly better.
        """
        uniform = math.log(self.model.config.vocab_size)
        found = f"ce {ce:.3f} (a uniform guess: {uniform:.3f})"
        # Fresh weights come out a little above or below the guess. Written so that NaN is called out, too.
        if ce < 0.95 * uniform:
            return found
        return (
            f"{found}\nWARNING: the teacher predicts the labels no better than a uniform guess, so a student learns "
            f"noise from it. Is {source} trained, and for this kind of text?"
        )
