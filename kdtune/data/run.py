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
        _check_validation(dataset_val)
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
    sources = examples_val.sources if isinstance(examples_val, Blend) else {examples_val.name: examples_val}
    val_batches = {
        name: ValBatches(
            examples,
            cfg.batch_size,
            packed=dataset_val.packed,
            group_by_length=dataset_val.group_by_length,
            share=share,
        )
        for name, examples in sources.items()
    }
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


def _check_validation(cfg: DatasetConfig) -> None:
    check_order("dataset_val", packed=cfg.packed, group_by_length=cfg.group_by_length)
    for name, source in cfg.sources.items():
        if source.weight is not None:
            raise ValueError(
                f"dataset_val.sources.{name}.weight={source.weight} says nothing for validation, where every row is "
                "seen once. Leave it out."
            )
