"""The order in which examples are seen, and how to come back to any place in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import numpy as np

from kdtune.data.batch import Batch, collate
from kdtune.data.examples import Examples


@final
class Loader:
    """Deals out examples in optimizer steps, epoch after epoch without end.

    The order is a function of (seed, epoch) alone: no global random state is read or changed. An epoch holds each
    example once; its last step takes what is left.

    Attributes:
        examples: what it deals out.
        epoch: complete epochs so far, so that `while loader.epoch < epochs` trains for `epochs` of them.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        max_steps_per_epoch: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        """
        Args:
            examples: at least one.
            batch_size: examples of a micro-batch.
            gradient_accumulation_steps: micro-batches of a step.
            max_steps_per_epoch: steps after which an epoch ends early, leaving its other examples out; None: none is.
            shuffle: a new order for each epoch; False: as read.
            seed: >= 0.
        """
        if len(examples) == 0:
            raise ValueError(f"{examples.name} has no examples.")
        self.examples = examples
        self._batch_size = batch_size
        self._step_size = batch_size * gradient_accumulation_steps
        self._shuffle = shuffle
        self._seed = seed
        whole = len(examples)
        self._epoch_size = min(whole, (max_steps_per_epoch or whole) * self._step_size)  # examples of an epoch
        self._position = 0  # examples of this epoch that were dealt out
        self.epoch = 0
        self._order = self._order_of(0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._epoch_size // self._step_size)

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step.

        Their loss is a sum over the whole step, so that it does not matter which micro-batch an example is in: they are
        grouped by length, which saves padding, longest first, which shows at once whether they fit into memory.
        """
        stop = min(self._position + self._step_size, self._epoch_size)
        chosen = self._order[self._position : stop].tolist()
        self._position += len(chosen)
        if self._position == self._epoch_size:
            self.epoch += 1
            self._position = 0
            self._order = self._order_of(self.epoch)
        chosen.sort(key=self.examples.length, reverse=True)
        return [
            collate([self.examples[i] for i in chosen[start : start + self._batch_size]])
            for start in range(0, len(chosen), self._batch_size)
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here. Small, and plain numbers only."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "step_size": self._step_size,
            "epoch_size": self._epoch_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self.examples.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place that `state_dict` described. A step may be split into other micro-batches than before.

        Raises:
            ValueError: the data, their order, or the size of a step or of an epoch changed: examples would be repeated
                or left out, or the number of steps would no longer stand for as many examples.
        """
        here = self.state_dict()
        names = {
            "fingerprint": "the examples (data, tokenizer or max_seq_len)",
            "seed": "seed",
            "shuffle": "shuffle",
            "step_size": "batch_size * gradient_accumulation_steps",
            "epoch_size": "max_steps_per_epoch (in examples)",
        }
        for key, what in names.items():
            if state[key] != here[key]:
                raise ValueError(
                    f"cannot continue in {self.examples.name}: {what} changed since the checkpoint ({state[key]} "
                    f"then, {here[key]} now), so that some rows would be seen twice, or others never. Restore it, or "
                    "start anew with resume_from_checkpoint=false and another output_dir."
                )
        self.epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self.examples))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.examples))


def batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """All examples once, in the order in which they were read: for validation."""
    for start in range(0, len(examples), batch_size):
        yield collate([examples[i] for i in range(start, min(start + batch_size, len(examples)))])
