"""The order of examples, exactly resumable; batches whose rows do not know each other."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kdtune import data
from kdtune.data import IGNORE, Batch, Examples, Loader

PAD = 999


def make_examples(count: int = 11) -> Examples:
    """Examples of different lengths; example i consists of the token i."""
    lengths = [2 + (7 * i) % 5 for i in range(count)]
    rows = [[([i] * length, [False] * (length - 1) + [True])] for i, length in enumerate(lengths)]
    return Examples.of("dataset", 64, rows)


def seen(step: list[Batch]) -> list[int]:
    return [int(row[0]) for batch in step for row in batch.tokens]


def snapshot(step: list[Batch]) -> list[Any]:
    return [[batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist()] for batch in step]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 2), (3, 1), (4, 5)])
def test_an_epoch_holds_each_example_once(shuffle: bool, batch_size: int, accumulation: int) -> None:
    loader = Loader(
        make_examples(),
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        shuffle=shuffle,
        seed=3,
    )
    orders = []
    for epoch in range(3):
        steps = []
        while loader.epoch == epoch:
            steps.append(loader.next_step())
            assert all(len(batch.tokens) <= batch_size for batch in steps[-1])
        assert len(steps) == loader.steps_per_epoch
        orders.append([i for step in steps for i in seen(step)])
        assert sorted(orders[-1]) == list(range(11))
        assert len(seen(steps[-1])) == (11 % (batch_size * accumulation) or batch_size * accumulation)
    assert (len({tuple(order) for order in orders}) > 1) == shuffle


def test_resuming_anywhere_in_two_epochs_equals_going_on() -> None:
    def loader() -> Loader:
        return Loader(make_examples(), batch_size=2, gradient_accumulation_steps=2, seed=5)

    uninterrupted = loader()
    steps = [uninterrupted.next_step() for _ in range(2 * uninterrupted.steps_per_epoch)]
    assert uninterrupted.epoch == 2
    for stop in range(len(steps) + 1):
        first = loader()
        for _ in range(stop):
            first.next_step()
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.epoch == first.epoch
        rest = [second.next_step() for _ in range(len(steps) - stop)]
        assert [snapshot(step) for step in rest] == [snapshot(step) for step in steps[stop:]]


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int) -> list[int]:
        loader = Loader(make_examples(), batch_size=1, seed=seed)
        return [seen(loader.next_step())[0] for _ in range(22)]

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = [torch.get_rng_state().tolist(), random.getstate()]
    first = order(0)
    assert before == [torch.get_rng_state().tolist(), random.getstate()]
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    assert order(0) == first
    assert order(1)[:11] != first[:11]
    assert order(1)[:11] != first[11:]  # seed 1's first epoch is not seed 0's second


def test_a_step_may_be_split_otherwise_when_resuming() -> None:
    first = Loader(make_examples(), batch_size=4, seed=1)
    dealt = seen(first.next_step())
    second = Loader(make_examples(), batch_size=2, gradient_accumulation_steps=2, seed=1)
    second.load_state_dict(first.state_dict())
    while second.epoch == 0:
        dealt += seen(second.next_step())
    assert sorted(dealt) == list(range(11))


def test_an_epoch_may_end_early() -> None:
    loader = Loader(make_examples(), batch_size=2, max_steps_per_epoch=3)
    assert loader.steps_per_epoch == 3
    dealt = [seen(loader.next_step()) for _ in range(3)]
    assert (loader.epoch, len({i for step in dealt for i in step})) == (1, 6)
    assert Loader(make_examples(), batch_size=2, max_steps_per_epoch=99).steps_per_epoch == 6


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Loader(make_examples(12), batch_size=1), "the examples"),
        (Loader(make_examples(), batch_size=1, seed=1), "seed changed"),
        (Loader(make_examples(), batch_size=1, shuffle=False), "shuffle changed"),
        (Loader(make_examples(), batch_size=2), r"batch_size \* gradient_accumulation_steps changed .*1 then, 2 now"),
        (
            Loader(make_examples(), batch_size=1, max_steps_per_epoch=5),
            "max_steps_per_epoch .* changed .*11 then, 5 now",
        ),
    ],
)
def test_resuming_with_other_data_or_steps_is_refused(other: Loader, message: str) -> None:
    state = Loader(make_examples(), batch_size=1).state_dict()
    with pytest.raises(ValueError, match=f"cannot continue in dataset: {message}"):
        other.load_state_dict(state)


def test_no_examples() -> None:
    with pytest.raises(ValueError, match="dataset has no examples"):
        Loader(Examples.of("dataset", 8, []), batch_size=1)


def test_collate_pads_on_the_right() -> None:
    examples = make_examples()
    rows = [examples[i] for i in range(4)]
    batch = data.collate(rows, PAD)
    assert batch.documents is None
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    for i, (tokens, labels) in enumerate(rows):
        s = len(tokens)
        assert batch.tokens[i, :s].tolist() == tokens.tolist()
        assert batch.labels[i, :s].tolist() == labels.tolist()
        assert (batch.tokens[i, s:] == PAD).all()
        assert (batch.labels[i, s:] == IGNORE).all()
        assert batch.positions[i].tolist() == list(range(batch.tokens.shape[1]))
    assert batch.tokens.shape[1] == max(len(tokens) for tokens, _ in rows)
    assert batch.num_labels == 4


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    examples = make_examples()
    tokens, labels = examples[2]
    for neighbours in ([], [0], [1, 4, 9], [3, 8]):
        batch = data.collate([examples[2], *[examples[i] for i in neighbours]], PAD)
        assert batch.tokens[0, : len(tokens)].tolist() == tokens.tolist()
        assert batch.labels[0, : len(labels)].tolist() == labels.tolist()


def test_batches_go_in_order() -> None:
    found = list(data.batches(make_examples(), 4))
    assert [len(batch.tokens) for batch in found] == [4, 4, 3]
    assert seen(found) == list(range(11))


def test_to() -> None:
    batch = data.collate([make_examples()[0]], PAD)
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.labels.device.type == moved.positions.device.type == "meta"
    assert moved.documents is None
    documents = Batch(batch.tokens, batch.labels, batch.positions, torch.zeros_like(batch.tokens)).to("meta").documents
    assert documents is not None
    assert documents.device.type == "meta"


def test_examples_are_compact() -> None:
    examples = make_examples(1000)
    assert examples.tokens.nbytes + examples.is_label.nbytes == 5 * (examples.num_tokens + len(examples))
    with pytest.raises(IndexError):
        examples[1000]


def test_fingerprint() -> None:
    assert make_examples().fingerprint == make_examples().fingerprint
    assert make_examples().fingerprint != make_examples(10).fingerprint
    other = Examples.of("dataset", 64, [[([1, 2, 3], [False, True, True])]])
    same_tokens = Examples.of("dataset", 64, [[([1, 2, 3], [False, False, True])]])
    assert other.fingerprint != same_tokens.fingerprint


def test_ids_name_examples_wherever_they_stand() -> None:
    examples = make_examples(50)
    assert len(set(examples.ids.tolist())) == 50
    assert examples.lengths.tolist() == [examples.length(i) for i in range(50)]
    rows = [
        [([int(i) for i in examples.tokens[a:b]], [False] * (b - a - 1) + [True])]
        for a, b in pairwise(examples.offsets)
    ]
    backwards = Examples.of("other", 32, rows[::-1])
    assert backwards.ids.tolist() == examples.ids.tolist()[::-1]
    assert backwards.fingerprint != examples.fingerprint
    variants = [([1, 2, 3], [0, 1, 1]), ([1, 2, 3], [0, 0, 1]), ([2, 1, 3], [0, 1, 1]), ([1, 2, 3, 3], [0, 1, 1, 1])]
    assert len({int(Examples.of("", 8, [[variant]]).ids[0]) for variant in variants}) == 4
