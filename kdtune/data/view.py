"""What a run reads."""

from __future__ import annotations

from dataclasses import dataclass

from kdtune.data.batch import Batch
from kdtune.data.examples import Examples
from kdtune.data.loader import Loader


@dataclass(frozen=True)
class RunData:
    """What a run reads, as a recipe's `load_data` makes it."""

    loader: Loader
    num_steps: int  # optimizer steps of the whole run
    examples_val: Examples | None
    val_batches: list[Batch]  # empty without validation

    def summary(self) -> str:
        """One line: how much there is to train on, and to validate on."""
        validation = f"; validation: {self.examples_val.summary()}" if self.examples_val else ""
        return f"{self.loader.examples.summary()}, {self.loader.summary()}{validation}"
