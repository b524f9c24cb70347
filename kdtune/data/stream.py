"""Rows too many to look at first: tokenised as training asks for them, mixed in a buffer, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, final

import numpy as np
import torch
from tqdm import tqdm

from kdtune.data import rows
from kdtune.data.batch import ALL, IGNORE, Batch, Example, Share, collate, without_labels
from kdtune.data.config import DatasetConfig
from kdtune.data.examples import NUM_PLACES, Examples, Part, counted, join, number_rows
from kdtune.data.loader import check_same, micro_batch_bounds
from kdtune.data.prepare import Source
from kdtune.tokenizers import Tokenizer

_NUM_FIRST = 256  # rows that are looked at before a run
_SHUFFLE_BUFFER = 10_000  # examples, unless the settings say otherwise
# What tells the random numbers of the files' order from those of a step, which come of (seed, step). Not 0: to numpy,
# (seed, n, 0) is (seed, n).
_ORDER_OF_FILES = 1


class _Place(NamedTuple):
    """Where an example of an epoch comes from."""

    shard: int
    row: int  # of the shard, from 0; rows that cannot be used count
    part: int  # of the row, which may make several examples


@final
class Stream:
    """A data set that is not tokenised before it is needed.

    Attributes:
        name: the section of the settings, for messages.
        rows: where the rows come from.
        shuffle_buffer: examples among which the next one is chosen; None: nothing was said.
        fingerprint: changes when the files, the tokenizer or a setting does that changes tokens.
    """

    def __init__(
        self,
        cfg: DatasetConfig,
        tokenizer: Tokenizer,
        max_seq_len: int,
        *,
        name: str = "dataset",
        vocab_size: int | None = None,
    ) -> None:
        """Arguments as those of `load`. No row is read.

        Raises:
            FileNotFoundError: nothing at cfg.source.
            ValueError: settings that do not fit.
        """
        given = {
            "packed": cfg.packed,
            "group_by_length": cfg.group_by_length,
            "join_documents": cfg.join_documents,
            "num_workers": cfg.num_workers,
            "cache_dir": cfg.cache_dir,
            "sources": cfg.sources,
        }
        for setting, value in given.items():
            if value:
                raise ValueError(
                    f"{name}.streaming=true reads rows as they are needed, and {name}.{setting} is for sets that are "
                    "tokenised before the run. Leave one of them out."
                )
        if cfg.split is not None and "[" in cfg.split:
            raise ValueError(
                f"{name}.streaming=true reads all rows of a split, not a part: {name}.split={cfg.split}. Leave one of "
                "them out."
            )
        self._source = Source(cfg, tokenizer, max_seq_len, name, vocab_size, streaming=True)
        self.name = name
        self.rows = self._source.rows
        self.shuffle_buffer = cfg.shuffle_buffer
        # The time of change does not count: a copy on another machine is the same set.
        key = self._source.key()
        key["files"] = [[name, size, digest] for name, size, _, digest in key["files"]]
        self.fingerprint = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
        self._told: set[str] = set()

    @cached_property
    def first(self) -> Examples:
        """The first rows as examples, for checks and summaries.

        Raises:
            ValueError: they cannot be used, or there is nothing to train on in them.
        """
        parts = (self.encode(row) for row in islice(self.rows.items(), _NUM_FIRST))
        first = join(f"{self.name} (first rows)", self._source.max_seq_len, number_rows(parts))
        self._source.check(first.counts, len(first), which="first ")
        first.counts.warn(first.name, first.max_seq_len)
        first.source = self.rows
        return first

    def encode(self, row: rows.Row) -> Part:
        """The examples of a row. The first rows that are skipped are told, each once, however often it is read."""
        part = self._source.encode([row])
        for place in part.counts.places:
            if place not in self._told and len(self._told) < NUM_PLACES:
                self._told.add(place)
                tqdm.write(f"{self.name}: skipped {place}")  # above the progress bar, if there is one
        return part


@final
class StreamLoader:
    """Deals out a stream in optimizer steps, pass after pass without end: the interface of `Loader`.

    With `shuffle`, files come in a new order in each pass, and each example is chosen at random among
    `Stream.shuffle_buffer` of those that were read; what is chosen is a function of (seed, step) alone. A pass holds
    each example once.

    Attributes:
        stream: what it deals out.
        examples: the first rows, to look at.
        epoch: complete passes so far.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        share: Share = ALL,
    ) -> None:
        """Arguments as those of `Loader`.

        Raises:
            ValueError: a shuffle_buffer without shuffle, or first rows that cannot be used.
        """
        if stream.shuffle_buffer is not None and not shuffle:
            raise ValueError(
                f"{stream.name}.shuffle_buffer={stream.shuffle_buffer} mixes rows, and shuffle=false keeps them in the "
                "order in which they are read. Leave one of them out."
            )
        self.stream = stream
        self.examples = stream.first
        self._batch_size = batch_size
        self._step_size = batch_size * gradient_accumulation_steps * share.num_ranks
        self._shuffle = shuffle
        self._buffer_size = (stream.shuffle_buffer or _SHUFFLE_BUFFER) if shuffle else 1
        self._seed = seed
        self._share = share
        self._steps = 0  # dealt out
        self._begin(0)

    @property
    def steps_per_epoch(self) -> int | None:
        """Not known."""
        return None

    def source_epochs(self) -> dict[str, float]:
        """Nothing: a stream is no blend."""
        return {}

    def summary(self) -> str:
        """Where the rows will come from."""
        num_shards = len(self.stream.rows.shards)
        files = f"{num_shards:,} files" if num_shards > 1 else "one file"
        return f"streamed from {files}" + (f" through a buffer of {self._buffer_size:,} examples" * self._shuffle)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, as those of `Loader.next_step`."""
        generator = np.random.default_rng([self._seed, self._steps])
        chosen: list[Example] = []
        self._fill()
        while self._buffer and len(chosen) < self._step_size:
            i = int(generator.integers(len(self._buffer)))
            self._buffer[i], self._buffer[-1] = self._buffer[-1], self._buffer[i]
            chosen.append(self._buffer.pop()[1])
            self._fill()
        self._steps += 1
        if not self._buffer:
            self._begin(self.epoch + 1)
        chosen.sort(key=lambda example: len(example[0]), reverse=True)
        bounds = micro_batch_bounds(len(chosen), self._batch_size, self._share.num_ranks)
        rows = [chosen[start:end] for start, end in bounds]
        mine = rows[self._share.rank :: self._share.num_ranks]
        return [self._share.of(collate(some) if some else without_labels(packed=False)) for some in mine]

    def _begin(self, epoch: int) -> None:
        """Goes to the start of a pass."""
        self.epoch = epoch
        self._read = _Place(0, 0, 0)  # the next example that goes into the buffer; the shard is a place in `_order`
        self._num_skipped = 0  # rows of this pass before that
        self._buffer: list[tuple[_Place, Example]] = []
        self._coming = self._examples()

    def _order(self) -> np.ndarray:
        """The files of this pass."""
        count = len(self.stream.rows.shards)
        if not self._shuffle:
            return np.arange(count)
        return np.random.default_rng([self._seed, self.epoch, _ORDER_OF_FILES]).permutation(count)

    def _fill(self) -> None:
        while len(self._buffer) < self._buffer_size and (found := next(self._coming, None)) is not None:
            place, example, self._num_skipped = found
            self._buffer.append((place, example))
            self._read = place._replace(part=place.part + 1)

    def _examples(self) -> Iterator[tuple[_Place, Example, int]]:
        """All examples of the pass from `_read` on, with the number of rows that were skipped up to each."""
        start, num_skipped = self._read, self._num_skipped
        for shard, index in enumerate(self._order().tolist()):
            if shard < start.shard:
                continue
            first_row = start.row if shard == start.shard else 0
            for number, row in enumerate(self.stream.rows.shards[index].read(first_row), start=first_row):
                is_start = (shard, number) == (start.shard, start.row)
                part = self.stream.encode(row)
                num_skipped += part.counts.num_skipped
                for place, example in _of_row(part, shard, number, start.part if is_start else 0):
                    yield place, example, num_skipped
        if num_skipped:
            tqdm.write(f"{self.stream.name}: {counted(num_skipped, 'row')} skipped in pass {self.epoch + 1:,}")

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here, on any rank: plain numbers, three for each example in the buffer."""
        return {
            "epoch": self.epoch,
            "steps": self._steps,
            "read": list(self._read),
            "num_skipped": self._num_skipped,
            "buffer": [number for place, _ in self._buffer for number in place],
            "step_size": self._step_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "buffer_size": self._buffer_size,
            "fingerprint": self.stream.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place that `state_dict` described: the rows of its buffer are read again.

        Raises:
            ValueError: what is read, its order, or the size of a step changed.
        """
        name = self.stream.name
        if "buffer" not in state:
            raise ValueError(
                f"cannot continue in {name}: the checkpoint is of a run without {name}.streaming=true, which saw rows "
                "in another order. Leave it out, or start anew."
            )
        kept = {
            "fingerprint": "the rows (files, tokenizer or settings)",
            "buffer_size": f"{name}.shuffle_buffer",
        }
        check_same(name, kept, state, self.state_dict())
        self._begin(state["epoch"])
        self._steps = state["steps"]
        numbers = iter(state["buffer"])
        places = [_Place(*place) for place in zip(numbers, numbers, numbers, strict=True)]
        found = self._find(set(places))
        self._buffer = [(place, found[place]) for place in places]
        self._read, self._num_skipped = _Place(*state["read"]), state["num_skipped"]
        self._coming = self._examples()

    def _find(self, places: set[_Place]) -> dict[_Place, Example]:
        """Reads examples again; rows between them are not tokenised."""
        found: dict[_Place, Example] = {}
        order = self._order()
        for shard in sorted({place.shard for place in places}):
            wanted = {place.row for place in places if place.shard == shard}
            first, last = min(wanted), max(wanted)
            read = self.stream.rows.shards[order[shard]].read(first)
            for number, row in zip(range(first, last + 1), read, strict=False):
                if number in wanted:
                    found.update(_of_row(self.stream.encode(row), shard, number))
        if not places <= found.keys():
            raise ValueError(f"cannot continue in {self.stream.name}: rows are gone that were there at the checkpoint.")
        return found


def _of_row(part: Part, shard: int, row: int, start: int = 0) -> Iterator[tuple[_Place, Example]]:
    ends = np.cumsum(part.sizes)
    for i in range(start, len(ends)):
        inside = slice(ends[i] - part.sizes[i], ends[i])
        tokens = torch.from_numpy(part.tokens[inside].astype(np.int64))
        is_label = torch.from_numpy(part.is_label[inside])
        yield _Place(shard, row, i), (tokens[:-1], torch.where(is_label[1:], tokens[1:], IGNORE))
