"""Several data sets dealt out as one, in given proportions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import final

import numpy as np
from torch import Tensor

from kdtune.data.examples import Counts, Examples

# What tells the random numbers of a source from those that group a blend's rows, which come of three numbers.
_TURN = 1


@final
class Blend:
    """Examples of several sources behind one another, and the order that mixes them.

    Draw k of a source of weight w has the time (k + 1/2) / w; draws come in the order of their times. So after any
    number of draws each of s sources has had its share of them, give or take 1/2 + w s / 2, w being its share of all
    (at any time a source has had its share but for 1/2, and all together for s / 2). The order is a function of the
    seed alone. Each source goes through all its examples, in a new order each time, before it repeats one.

    Attributes:
        name: which data set this is, for messages.
        max_seq_len: the limit that was applied to all of them.
        sources: by their names.
        weights: [s], shares of the draws, which add up to 1.
    """

    def __init__(self, name: str, sources: Mapping[str, Examples], weights: Mapping[str, float] | None) -> None:
        """
        Args:
            name: for messages.
            sources: at least one, each with an example, of the same max_seq_len.
            weights: relative to each other; None: the number of examples, so that an epoch holds every example once.
        """
        self.name = name
        self.sources = dict(sources)
        (self.max_seq_len,) = {examples.max_seq_len for examples in sources.values()}
        self._sizes = np.array([len(examples) for examples in sources.values()])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        given = self._sizes if weights is None else np.array([weights[source] for source in sources], float)
        self.weights = given / given.sum()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        source = int(self.source_of(np.array([i]))[0])
        return list(self.sources.values())[source][i - int(self._starts[source])]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[n] int64, positions of each example."""
        return np.concatenate([examples.lengths for examples in self.sources.values()])

    @cached_property
    def label_counts(self) -> np.ndarray:
        """[n] int64, scored positions of each example."""
        return np.concatenate([examples.label_counts for examples in self.sources.values()])

    @cached_property
    def ids(self) -> np.ndarray:
        """[n] uint64, see `Examples`."""
        return np.concatenate([examples.ids for examples in self.sources.values()])

    @cached_property
    def fingerprint(self) -> int:
        """Changes when an example of a source or a weight does."""
        prints = [examples.fingerprint for examples in self.sources.values()]
        return zlib.crc32(self.weights.tobytes(), zlib.crc32(np.array(prints).tobytes()))

    @property
    def counts(self) -> Counts:
        """What became of the rows of all sources."""
        counts = Counts()
        for examples in self.sources.values():
            counts.add(examples.counts)
        return counts

    @property
    def num_tokens(self) -> int:
        """Positions of all examples together, without padding."""
        return sum(examples.num_tokens for examples in self.sources.values())

    @property
    def num_labels(self) -> int:
        """Scored positions of all examples together."""
        return sum(examples.num_labels for examples in self.sources.values())

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Which source each example is of, counted from 0."""
        return np.searchsorted(self._starts, indices, "right") - 1

    def order(self, epoch: int, seed: int | None) -> np.ndarray:
        """The draws of an epoch, which are as many as there are examples: [n] int64, indices of examples.

        Args:
            epoch: from 0; the next goes on where this one ends.
            seed: None: each source in the order in which it was read.
        """
        first, behind = self.num_draws(epoch * len(self)), self.num_draws((epoch + 1) * len(self))
        times, examples = [], []
        for source, (start, stop) in enumerate(zip(first, behind, strict=True)):
            draws = np.arange(start, stop)
            times.append((draws + 0.5) / self.weights[source])
            examples.append(self._starts[source] + self._examples(source, draws, seed))
        # Draws of the same time come in the order of their sources.
        return np.concatenate(examples)[np.argsort(np.concatenate(times), kind="stable")]

    def num_draws(self, count: int) -> np.ndarray:
        """[s] int64, how many of the first `count` draws are of each source."""
        # Before the time count - s/2 there are at most `count` draws; what is missing then are the next ones.
        time = count - len(self.weights) / 2
        draws = np.maximum(0, np.floor(time * self.weights + 0.5)).astype(np.int64)
        while draws.sum() < count:
            draws[np.argmin((draws + 0.5) / self.weights)] += 1
        return draws

    def _examples(self, source: int, draws: np.ndarray, seed: int | None) -> np.ndarray:
        size = int(self._sizes[source])
        found = draws % size
        if seed is None or not len(draws):
            return found
        first = int(draws[0])
        for turn in range(first // size, int(draws[-1]) // size + 1):
            of_turn = slice(max(0, turn * size - first), (turn + 1) * size - first)
            generator = np.random.default_rng([seed, source, turn, _TURN])
            found[of_turn] = generator.permutation(size)[found[of_turn]]
        return found

    def summary(self) -> str:
        """One line: the shares, and what the sources have."""
        shares = zip(self.weights, self.sources.values(), strict=True)
        return "; ".join(f"{share:.1%} {examples.summary()}" for share, examples in shares)
