"""What an example is known by: a hash of its content, the same in every run, order and source."""

from __future__ import annotations

import numpy as np

_HASH_BLOCK = 2**20  # tokens whose hashes, 8 bytes each, exist at one time


def example_ids(tokens: np.ndarray, is_label: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[n] uint64: a hash of each example's tokens, labels and length.

    A sum of splitmix64 (Steele, Lea and Flood 2014) over (position, token, label), mixed once more: examples that
    differ in one token always differ, others are alike by a chance of 2 ** -64.

    Args:
        tokens: [t] int32, those of all examples.
        is_label: [t] bool.
        sizes: [n] int64, tokens of each example, >= 1.
    """
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    sums = np.empty(len(sizes), np.uint64)
    start = 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + _HASH_BLOCK, "right")) - 1)
        first, last = offsets[start], offsets[stop]
        positions = np.arange(last - first) - np.repeat(offsets[start:stop] - first, sizes[start:stop])
        values = positions.astype(np.uint64) << np.uint64(32)
        values |= tokens[first:last].astype(np.uint64) << np.uint64(1)
        values |= is_label[first:last]
        sums[start:stop] = np.add.reduceat(_mix(values), offsets[start:stop] - first)
        start = stop
    return _mix(sums)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
