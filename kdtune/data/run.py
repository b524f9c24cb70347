"""What a run reads, from the settings of its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdtune.data.batch import ALL, Share
from kdtune.data.blend import Blend
from kdtune.data.config import DatasetConfig
from kdtune.data.examples import Examples
from kdtune.data.loader import Loader, ValBatches, check_order
from kdtune.data.prepare import open_set
from kdtune.data.stream import Stream, StreamLoader
from kdtune.tokenizers import Tokenizer


@dataclass(frozen=True)
class RunData:
    """What a run reads, as a recipe's `load_data` makes it."""

    loader: Loader | StreamLoader
    num_steps: int  # optimizer steps of the whole run
    examples_val: Examples | Blend | None
    val_batches: dict[str, ValBatches]  # of each source; empty without validation

    def summary(self) -> str:
        """One line: how much there is to train on, and to validate on."""
        validation = f"; validation: {self.examples_val.summary()}" if self.examples_val else ""
        return f"{self.loader.examples.summary()}, {self.loader.summary()}{validation}"


def load_run(cfg: Any, tokenizer: Tokenizer, vocab_size: int | None = None, share: Share = ALL) -> RunData:
    """Reads what a run trains and validates on. What can be refused without a row is refused before one is tokenised.

    Args:
        cfg: a recipe's settings.
        tokenizer: that of the student; teacher and student see the same ids.
        vocab_size: ids that the models have; None: as many as the tokenizer.
        share: what this process gets of each step.

    Raises:
        FileNotFoundError: nothing at a source.
        ValueError: settings that exclude each other, or rows that cannot be used.
    """
    dataset, dataset_val, max_seq_len = cfg.dataset, cfg.dataset_val, cfg.tokenizer.max_seq_len
    check_order(
        "dataset",
        packed=dataset.packed,
        group_by_length=dataset.group_by_length,
        shuffle=cfg.shuffle,
        max_steps_per_epoch=cfg.max_steps_per_epoch,
        is_blend=bool(dataset.sources),
    )
    if dataset.streaming:
        _check_length(cfg.epochs, cfg.max_steps_per_epoch, cfg.max_steps)
    if dataset_val is not None:
        check_validation(dataset_val, "dataset_val")
    open_one = Stream if dataset.streaming else open_set
    opened = open_one(dataset, tokenizer, max_seq_len, vocab_size=vocab_size)
    opened_val = None
    if dataset_val is not None:
        opened_val = open_set(dataset_val, tokenizer, max_seq_len, name="dataset_val", vocab_size=vocab_size)

    loader: Loader | StreamLoader
    step = {"batch_size": cfg.batch_size, "gradient_accumulation_steps": cfg.gradient_accumulation_steps}
    if isinstance(opened, Stream):
        assert cfg.max_steps is not None
        loader, num_steps = StreamLoader(opened, **step, shuffle=cfg.shuffle, seed=cfg.seed, share=share), cfg.max_steps
    else:
        loader = Loader(
            opened.load(),
            **step,
            max_steps_per_epoch=cfg.max_steps_per_epoch,
            shuffle=cfg.shuffle,
            seed=cfg.seed,
            packed=dataset.packed,
            group_by_length=dataset.group_by_length,
            share=share,
        )
        num_steps = loader.num_steps(cfg.epochs, cfg.max_steps)
    if dataset_val is None or opened_val is None:
        return RunData(loader, num_steps, None, {})
    examples_val = opened_val.load()
    val_batches = batches_by_source(examples_val, dataset_val, cfg.batch_size, share)
    return RunData(loader, num_steps, examples_val, val_batches)


def _check_length(epochs: int, max_steps_per_epoch: int | None, max_steps: int | None) -> None:
    if max_steps is None or epochs != 1:
        raise ValueError(
            "dataset.streaming=true does not know how many rows there are, so that epochs cannot be counted. Give "
            "max_steps, and leave epochs out."
        )
    if max_steps_per_epoch is not None:
        raise ValueError(
            f"dataset.streaming=true knows no epochs, so that max_steps_per_epoch={max_steps_per_epoch} says nothing. "
            "Leave it out; max_steps ends the run."
        )


def batches_by_source(
    examples: Examples | Blend, cfg: DatasetConfig, batch_size: int, share: Share = ALL
) -> dict[str, ValBatches]:
    """Batches of all rows of each source, by its name, for what does not depend on their order.

    Args:
        examples: what was loaded.
        cfg: its settings, which `check_validation` let pass.
        batch_size: rows of a batch.
        share: what this process gets of them.
    """
    sources = examples.sources if isinstance(examples, Blend) else {examples.name: examples}
    packed, group_by_length = cfg.packed, cfg.group_by_length
    return {
        name: ValBatches(one, batch_size, packed=packed, group_by_length=group_by_length, share=share)
        for name, one in sources.items()
    }


def check_validation(cfg: DatasetConfig, name: str) -> None:
    """Refuses settings of a data set that say nothing where every row is seen once.

    Args:
        cfg: the settings.
        name: their section.

    Raises:
        ValueError: which, and what to do.
    """
    check_order(name, packed=cfg.packed, group_by_length=cfg.group_by_length)
    for source_name, source in cfg.sources.items():
        if source.weight is not None:
            raise ValueError(
                f"{name}.sources.{source_name}.weight={source.weight} says nothing for validation, where every row is "
                "seen once. Leave it out."
            )
