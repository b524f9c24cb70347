"""The order in which examples are seen, and how to come back to any place in it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, final

import numpy as np

from kdtune.data.batch import ALL, Batch, Share, collate, collate_packed, without_labels
from kdtune.data.blend import Blend
from kdtune.data.examples import Examples
from kdtune.data.packing import RowPlan, pack

# Steps whose rows are sorted by length together. With 16, four rows of GSM8K waste 3% of their positions instead of
# 27% (docs/data.md); more would save little and make the lengths of a step less random.
_STEPS_PER_GROUP = 16


@final
class Loader:
    """Deals out examples in optimizer steps, epoch after epoch without end.

    The order is a function of (seed, epoch) and the settings alone: no global random state is read or changed. An epoch
    holds each example once; its last step takes what is left.

    Attributes:
        examples: what it deals out.
        epoch: complete epochs so far, so that `while loader.epoch < epochs` trains for `epochs` of them.
    """

    def __init__(
        self,
        examples: Examples | Blend,
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        max_steps_per_epoch: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        packed: bool = False,
        group_by_length: bool | None = None,
        share: Share = ALL,
    ) -> None:
        """
        Args:
            examples: at least one.
            batch_size: rows of a micro-batch.
            gradient_accumulation_steps: micro-batches of a step on each rank.
            max_steps_per_epoch: steps after which an epoch ends early, leaving its other examples out; None: none is.
            shuffle: a new order for each epoch; False: as read.
            seed: >= 0.
            packed: rows of several examples, as many as fit into examples.max_seq_len; False: of one each.
            group_by_length: steps of rows of similar length, in random order; None: if shuffled, not packed, no blend.
            share: what this process gets of each step.

        Raises:
            ValueError: no examples, or settings that `check_order` refuses.
        """
        if len(examples) == 0:
            raise ValueError(f"{examples.name} has no examples.")
        check_order(
            examples.name,
            packed=packed,
            group_by_length=group_by_length,
            shuffle=shuffle,
            max_steps_per_epoch=max_steps_per_epoch,
            is_blend=isinstance(examples, Blend),
        )
        self.examples = examples
        if group_by_length is None:  # steps of similar rows of a blend could be of one source
            group_by_length = shuffle and not packed and not isinstance(examples, Blend)
        self._group_by_length = group_by_length
        self._batch_size = batch_size
        self._step_size = batch_size * gradient_accumulation_steps * share.num_ranks  # rows of a step, of all ranks
        self._max_steps_per_epoch = max_steps_per_epoch or sys.maxsize
        self._shuffle = shuffle
        self._seed = seed
        self._packed = packed
        self._share = share
        self._lengths = examples.lengths
        self._position = 0  # rows of this epoch that were dealt out, to all ranks
        self.epoch = 0
        self._rows = self._plan(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the present epoch. Packed rows are made anew in each epoch, and may be one more or less."""
        return -(-self._epoch_size // self._step_size)

    @property
    def _epoch_size(self) -> int:
        return min(len(self._rows), self._max_steps_per_epoch * self._step_size)

    def num_steps(self, epochs: int, max_steps: int | None = None) -> int:
        """Steps of this many epochs from the first, but at most `max_steps`."""
        if max_steps is None:
            max_steps = sys.maxsize
        if not self._packed:
            return min(epochs * self.steps_per_epoch, max_steps)
        total = 0
        for epoch in range(epochs):
            if total >= max_steps:
                break
            rows = self._rows if epoch == self.epoch else self._plan(epoch)
            total += min(-(-len(rows) // self._step_size), self._max_steps_per_epoch)
        return min(total, max_steps)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step; every rank has as many.

        The loss is a sum over the whole step, so that it does not matter which micro-batch a row is in: they are
        grouped by length, which saves padding, longest first, which shows at once whether they fit into memory.
        """
        stop = min(self._position + self._step_size, self._epoch_size)
        step = [self._rows[row] for row in range(self._position, stop)]
        self._position = stop
        if self._position == self._epoch_size:
            self.epoch += 1
            self._position = 0
            self._rows = self._plan(self.epoch)
        step.sort(key=lambda row: self._lengths[row].sum(), reverse=True)
        bounds = micro_batch_bounds(len(step), self._batch_size, self._share.num_ranks)
        rows = [step[start:end] for start, end in bounds]
        # Neighbours in length go through the model at the same time, each on its rank, so that none waits for long.
        mine = rows[self._share.rank :: self._share.num_ranks]
        return [self._share.of(_collate(self.examples, some, self._packed)) for some in mine]

    @property
    def place(self) -> tuple[int, int]:
        """Where it is: complete epochs, and rows of the present one."""
        return self.epoch, self._position

    def copy(self) -> Loader:
        """One that deals out the same from here on, and leaves this one where it is."""
        return copy.copy(self)

    def summary(self) -> str:
        """How much of what the model computes is padding, in the present epoch."""
        lengths = self._rows.lengths(self._lengths)[: self._epoch_size]
        if self._packed:
            capacity = self.examples.max_seq_len
            fill = lengths.sum() / (len(lengths) * capacity)
            return f"packed into {capacity:,} x {len(lengths):,} rows an epoch, {fill:.1%} filled"
        whole = len(lengths) // self._step_size * self._step_size
        steps = -np.sort(-lengths[:whole].reshape(-1, self._step_size), axis=1)
        computed = steps.reshape(-1, self._batch_size).max(axis=1, initial=0).sum() * self._batch_size
        rest = -np.sort(-lengths[whole:])
        computed += sum(
            (end - start) * rest[start]
            for start, end in micro_batch_bounds(len(rest), self._batch_size, self._share.num_ranks)
            if end > start
        )
        return f"{1 - lengths.sum() / computed:.1%} padding in an epoch"

    def source_epochs(self) -> dict[str, float]:
        """How often each source of a blend has been gone through by now; empty for a single data set."""
        if not isinstance(self.examples, Blend):
            return {}
        draws = self.examples.num_draws(self.epoch * len(self.examples))
        dealt = self._rows.indices[: self._rows.starts[self._position]]
        draws = draws + np.bincount(self.examples.source_of(dealt), minlength=len(draws))
        return {
            name: draw / len(source) for draw, (name, source) in zip(draws, self.examples.sources.items(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here, on any rank. Small, and plain numbers only."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "step_size": self._step_size,
            "epoch_size": self._epoch_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "packed": self.examples.max_seq_len if self._packed else False,
            "group_by_length": self._group_by_length,
            "fingerprint": self.examples.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place that `state_dict` described. A step may be split into other micro-batches than before, and
        among other ranks.

        Raises:
            ValueError: the data, their order, or the size of a step or of an epoch changed: examples would be repeated
                or left out, or the number of steps would no longer stand for as many examples.
        """
        name = self.examples.name
        if "position" not in state:
            raise ValueError(
                f"cannot continue in {name}: the checkpoint is of a run with {name}.streaming=true, which saw rows in "
                "another order. Give it again, or start anew."
            )
        if "packed" not in state:
            raise ValueError(
                f"cannot continue in {name}: the checkpoint is of an older kdtune, which dealt rows out in another "
                "order. Finish that run with the version that began it, or start anew."
            )
        self.epoch, self._position = state["epoch"], state["position"]
        self._rows = self._plan(self.epoch)
        kept = {
            "fingerprint": "the examples (data, tokenizer or max_seq_len)",
            "packed": f"{name}.packed (or tokenizer.max_seq_len)",
            "group_by_length": f"{name}.group_by_length",
            "epoch_size": "max_steps_per_epoch (in rows)",
        }
        check_same(name, kept, state, self.state_dict())

    def _plan(self, epoch: int) -> RowPlan:
        """The rows of an epoch in their order, as many as the examples make."""
        count = len(self.examples)
        order = self.examples.order(epoch, self._seed if self._shuffle else None)
        if self._packed:
            rows = pack(self._lengths[order], self.examples.max_seq_len)
            return RowPlan(order[rows.indices], rows.starts)
        if self._group_by_length:
            seen = min(count // self._step_size, self._max_steps_per_epoch) * self._step_size
            generator = np.random.default_rng([self._seed, epoch, _STEPS_PER_GROUP])  # another than that of the order
            order = np.concatenate([self._group(order[:seen], generator), order[seen:]])
        return RowPlan.of_one(order)

    def _group(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Whole steps of rows of similar length: sorted within some steps at a time, then the steps are shuffled."""
        size = _STEPS_PER_GROUP * self._step_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        by_length = [group[np.argsort(self._lengths[group], kind="stable")] for group in groups]
        steps = np.concatenate([order[:0], *by_length]).reshape(-1, self._step_size)
        return generator.permutation(steps).reshape(-1)


def micro_batch_bounds(num_rows: int, batch_size: int, num_ranks: int) -> Iterator[tuple[int, int]]:
    """Bounds of the micro-batches of all ranks: as many for each, of even sizes, batch_size or less."""
    count = -(-num_rows // (batch_size * num_ranks)) * num_ranks
    return pairwise(num_rows * i // max(count, 1) for i in range(count + 1))


def batches(examples: Examples | Blend, batch_size: int, share: Share = ALL) -> Iterator[Batch]:
    """All examples once, a row each, in the order in which they were read; each rank gets all, its slice of them."""
    for start in range(0, len(examples), batch_size):
        yield share.of(collate([examples[i] for i in range(start, min(start + batch_size, len(examples)))]))


@final
class ValBatches:
    """All examples once, for what does not depend on their order. Batches are made as they are asked for.

    Rows are packed; or the longest come first, which saves padding; or they stay in the order in which they were read.

    Attributes:
        examples: what they are made of.
    """

    def __init__(
        self,
        examples: Examples | Blend,
        batch_size: int,
        *,
        packed: bool = False,
        group_by_length: bool | None = None,
        share: Share = ALL,
        only: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            examples: at least one.
            batch_size: rows of a batch.
            packed: rows of several examples, as many as fit into examples.max_seq_len; False: of one each.
            group_by_length: the longest first; None: if not packed.
            share: what this process gets of them; each gets as many.
            only: [n] int64, indices of the examples that are wanted; None: all.

        Raises:
            ValueError: group_by_length of packed rows.
        """
        check_order(examples.name, packed=packed, group_by_length=group_by_length)
        self.examples = examples
        self._batch_size = batch_size
        self._packed = packed
        self._share = share
        wanted = np.arange(len(examples)) if only is None else only
        lengths = examples.lengths[wanted]
        if packed:
            rows = pack(lengths, examples.max_seq_len)
            self._rows = RowPlan(wanted[rows.indices], rows.starts)
        elif group_by_length is False:
            self._rows = RowPlan.of_one(wanted)
        else:
            self._rows = RowPlan.of_one(wanted[np.argsort(-lengths, kind="stable")])

    @property
    def num_labels(self) -> int:
        """Scored positions of all of them."""
        return self.examples.num_labels

    def __len__(self) -> int:
        return -(-len(self._rows) // (self._batch_size * self._share.num_ranks))

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            start = (i * self._share.num_ranks + self._share.rank) * self._batch_size
            rows = range(start, min(start + self._batch_size, len(self._rows)))
            yield self._share.of(_collate(self.examples, [self._rows[row] for row in rows], self._packed))


def _collate(examples: Examples | Blend, rows: Sequence[np.ndarray], packed: bool) -> Batch:
    if not rows:
        return without_labels(packed)
    documents = [[examples[i] for i in row.tolist()] for row in rows]
    return collate_packed(documents) if packed else collate([document for (document,) in documents])


def check_order(
    name: str,
    *,
    packed: bool,
    group_by_length: bool | None,
    shuffle: bool = True,
    max_steps_per_epoch: int | None = None,
    is_blend: bool = False,
) -> None:
    """Refuses settings of the order that exclude each other. It needs no rows, so that it can be asked before any.

    Args:
        name: the section of the data set's settings.
        packed: as those of `Loader`, like the next three.
        is_blend: the data set has several sources.

    Raises:
        ValueError: which, and what to do.
    """
    if group_by_length and packed:
        raise ValueError(
            f"{name}.group_by_length=true is for rows of one document each; with {name}.packed=true all rows are full, "
            "and there is nothing to group. Leave one of them out."
        )
    if group_by_length and not shuffle:
        raise ValueError(
            f"{name}.group_by_length=true puts rows of similar length into a step, and shuffle=false keeps them in the "
            "order in which they were read. Leave one of them out."
        )
    if max_steps_per_epoch and is_blend:
        raise ValueError(
            f"max_steps_per_epoch={max_steps_per_epoch} would leave out what an epoch of {name}.sources still has to "
            "draw, so that a source would skip rows. Leave it out; max_steps ends the run."
        )


def check_same(name: str, kept: Mapping[str, str], state: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses to resume a loader where others would be the next rows.

    Args:
        name: of the data set.
        kept: what must be as it was beside seed, shuffle and the rows of a step: keys of the states, and their names.
        state: of the checkpoint.
        here: of the loader.

    Raises:
        ValueError: what changed, and both values.
    """
    always = {
        "seed": "seed",
        "shuffle": "shuffle",
        "step_size": "batch_size * gradient_accumulation_steps (times ranks)",
    }
    for key, what in {**always, **kept}.items():
        if state[key] != here[key]:
            raise ValueError(
                f"cannot continue in {name}: {what} changed since the checkpoint ({state[key]} then, {here[key]} now), "
                "so that some rows would be seen twice, or others never. Restore it, or start anew with "
                "resume_from_checkpoint=false and another output_dir."
            )
