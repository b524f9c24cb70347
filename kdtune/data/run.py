"""What a run reads, from the settings of its recipe."""

from __future__ import annotations

from dataclasses import dataclass

from kdtune.data.batch import Batch
from kdtune.data.blend import Blend
from kdtune.data.examples import Examples
from kdtune.data.loader import Loader
from kdtune.data.stream import StreamLoader


@dataclass(frozen=True)
class RunData:
    """What a run reads, as a recipe's `load_data` makes it."""

    loader: Loader | StreamLoader
    num_steps: int  # optimizer steps of the whole run
    examples_val: Examples | Blend | None
    val_batches: dict[str, list[Batch]]  # of each source; empty without validation

    def summary(self) -> str:
        """One line: how much there is to train on, and to validate on."""
        validation = f"; validation: {self.examples_val.summary()}" if self.examples_val else ""
        return f"{self.loader.examples.summary()}, {self.loader.summary()}{validation}"
