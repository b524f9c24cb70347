"""The order of examples, exactly resumable; batches whose rows do not know each other."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kdtune import data
from kdtune.data import IGNORE, Batch, Examples, Loader
from kdtune.data.batch import without_labels

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
        (
            Loader(make_examples(), batch_size=2),
            r"batch_size \* gradient_accumulation_steps \(times ranks\) changed .*1 then, 2 now",
        ),
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_tokens_that_are_no_padding(packed: bool, num_slices: int) -> None:
    """Of whole rows and of slices, which a row may end before; a batch that teaches nothing has none."""
    examples = make_examples()
    documents = [[0, 1], [2], [3, 9, 4]] if packed else [[i] for i in range(4)]
    made = [[examples[i] for i in row] for row in documents]
    batch = data.collate_packed(made, PAD) if packed else data.collate([row for (row,) in made], PAD)
    expected = [sum(len(tokens) for tokens, _ in row) for row in made]
    slices = [data.Share(slice=i, num_slices=num_slices).of(batch) for i in range(num_slices)]
    for whole, parts in zip(expected, zip(*(part.lengths.tolist() for part in slices), strict=True), strict=True):
        length = slices[0].tokens.shape[1]
        assert list(parts) == [min(max(whole - i * length, 0), length) for i in range(num_slices)]
    assert data.count_tokens(slices) == sum(expected)
    assert batch.to("meta").lengths.is_meta
    assert without_labels(packed).num_tokens == 0


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
    documents = data.collate_packed([[make_examples()[0]]]).to("meta").documents
    assert documents is not None
    assert documents.starts.device.type == "meta"
    assert documents.lengths == [len(batch.tokens[0])], "known to the host wherever the batch is"


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
    assert examples.lengths.tolist() == [len(examples[i][0]) for i in range(50)]
    rows = [
        [([int(i) for i in examples.tokens[a:b]], [False] * (b - a - 1) + [True])]
        for a, b in pairwise(examples.offsets)
    ]
    backwards = Examples.of("other", 32, rows[::-1])
    assert backwards.ids.tolist() == examples.ids.tolist()[::-1]
    assert backwards.fingerprint != examples.fingerprint
    variants = [([1, 2, 3], [0, 1, 1]), ([1, 2, 3], [0, 0, 1]), ([2, 1, 3], [0, 1, 1]), ([1, 2, 3, 3], [0, 1, 1, 1])]
    assert len({int(Examples.of("", 8, [[variant]]).ids[0]) for variant in variants}) == 4


# Ranks, packing, grouping: who sees what, and how much of it is padding.

WAYS: list[dict[str, Any]] = [
    {},
    {"packed": True},
    {"shuffle": False},
    {"shuffle": False, "packed": True},
    {"group_by_length": False},
]


def labelled(step: list[Batch]) -> list[int]:
    """The examples of a step, packed or not, by their only labels; a batch that fills an uneven end has none."""
    return [int(label) for batch in step for label in batch.labels[batch.labels != IGNORE]]


def many_examples(count: int = 101, max_seq_len: int = 40) -> Examples:
    """Of 2 to 33 positions; example i is labelled i, once."""
    lengths = [3 + (i * i) % 32 for i in range(count)]
    rows = [[([i] * length, [False] * (length - 1) + [True])] for i, length in enumerate(lengths)]
    return Examples.of("dataset", max_seq_len, rows)


def on_ranks(examples: Examples, num_ranks: int, **settings: Any) -> list[Loader]:
    """One loader for each of the processes that share a step."""
    return [Loader(examples, share=data.Share(rank, num_ranks), **settings) for rank in range(num_ranks)]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize(("num_ranks", "batch_size", "accumulation"), [(2, 3, 2), (3, 4, 1), (5, 2, 3)])
def test_ranks_share_a_step(how: dict[str, Any], num_ranks: int, batch_size: int, accumulation: int) -> None:
    examples = many_examples()
    alone = Loader(examples, batch_size=num_ranks * batch_size * accumulation, **how)
    ranks = on_ranks(examples, num_ranks, batch_size=batch_size, gradient_accumulation_steps=accumulation, **how)
    assert alone.num_steps(2) == ranks[0].num_steps(2)
    for _ in range(alone.num_steps(2)):
        whole = labelled(alone.next_step())
        steps = [rank.next_step() for rank in ranks]
        assert len({len(step) for step in steps}) == 1, "all take part in the same collective operations"
        assert all(len(batch.tokens) <= batch_size for step in steps for batch in step)
        assert sorted(i for step in steps for i in labelled(step)) == sorted(whole)
        assert len({str(loader.state_dict()) for loader in ranks}) == 1
        assert {loader.epoch for loader in ranks} == {alone.epoch}


def test_an_uneven_end_is_filled_with_batches_that_teach_nothing() -> None:
    for packed in (False, True):
        examples = Examples.of("dataset", 8, [[([5, 6, 7, 8, 9, 1], [False, *[True] * 5])]])
        steps = [loader.next_step() for loader in on_ranks(examples, 3, batch_size=2, packed=packed)]
        assert sorted(data.count_labels(step) for step in steps) == [0, 0, 5]
        assert all((batch.documents is not None) == packed for step in steps for batch in step)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_slices", [2, 3, 50])
def test_slices_of_rows(packed: bool, num_slices: int) -> None:
    """Side by side they are the rows, with some padding; also of a batch that teaches nothing."""
    examples = many_examples(5)

    def sources(share: data.Share) -> Iterator[Batch]:
        yield from Loader(examples, batch_size=2, packed=packed, seed=1, share=share).next_step()
        yield from data.ValBatches(examples, 2, packed=packed, share=share)
        yield next(data.batches(examples, 2, share))

    for rank in range(4):
        whole = list(sources(data.Share(rank, 4)))
        slices = [list(sources(data.Share(rank, 4, i, num_slices))) for i in range(num_slices)]
        for batch, *parts in zip(whole, *slices, strict=True):
            s = batch.tokens.size(1)
            assert len({part.tokens.shape for part in parts}) == 1
            for name, fill in (("tokens", 0), ("labels", IGNORE), ("positions", None)):
                joined = torch.cat([getattr(part, name) for part in parts], dim=1)
                assert joined.size(1) - s < num_slices
                assert torch.equal(joined[:, :s], getattr(batch, name))
                assert fill is None or (joined[:, s:] == fill).all()
            for part in parts:
                if batch.documents is None:
                    assert part.documents is None
                else:
                    assert part.documents is not None
                    assert part.documents.rows == batch.documents.rows
                    assert part.documents.row_length == num_slices * part.tokens.size(1)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_every_example_is_seen_once_whatever_the_ranks_after_a_stop(how: dict[str, Any]) -> None:
    """24 rows a step, split otherwise on each resume; two epochs."""
    splits = [(1, 24, 1), (2, 3, 4), (4, 6, 1), (3, 1, 8), (24, 1, 1)]
    examples = many_examples()

    def loaders(split: tuple[int, int, int], state: dict[str, Any] | None) -> list[Loader]:
        num_ranks, batch_size, accumulation = split
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        made = on_ranks(examples, num_ranks, **sizes, seed=2, **how)
        for loader in made:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        return made

    uninterrupted = loaders(splits[0], None)[0]
    expected = [sorted(labelled(uninterrupted.next_step())) for _ in range(uninterrupted.num_steps(2))]
    assert sorted(i for step in expected for i in step) == sorted([*range(101)] * 2)
    found: list[list[int]] = []
    state = None
    for number in range(len(expected)):
        ranks = loaders(splits[number % len(splits)], state)
        found.append(sorted(i for loader in ranks for i in labelled(loader.next_step())))
        state = ranks[-1].state_dict()
    assert found == expected


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_split_of_a_step_does_not_change_its_rows(how: dict[str, Any]) -> None:
    found = []
    for batch_size, accumulation in [(12, 1), (4, 3), (1, 12)]:
        loader = Loader(many_examples(), batch_size=batch_size, gradient_accumulation_steps=accumulation, **how)
        found.append([sorted(labelled(loader.next_step())) for _ in range(2 * loader.steps_per_epoch)])
    assert found[0] == found[1] == found[2]


def test_packed_rows_are_new_in_each_epoch_and_their_steps_are_counted() -> None:
    loader = Loader(many_examples(), batch_size=2, packed=True)
    rows: list[list[list[int]]] = []
    for epoch in range(4):
        rows.append([])
        count = loader.steps_per_epoch
        while loader.epoch == epoch:
            for batch in loader.next_step():
                parts = zip(*(part.split(1) for part in (batch.tokens, batch.labels, batch.positions)), strict=True)
                rows[-1] += [labelled([Batch(*row)]) for row in parts]
            count -= 1
        assert count == 0
        assert sorted(i for row in rows[-1] for i in row) == list(range(101))
    assert len({str(sorted(map(sorted, epoch))) for epoch in rows}) == 4
    assert loader.num_steps(4) == sum(-(-len(epoch) // 2) for epoch in rows)
    assert loader.num_steps(4, max_steps=5) == 5
    assert Loader(many_examples(), batch_size=2, packed=True, max_steps_per_epoch=3).num_steps(4) == 12


def test_reading_order_is_kept() -> None:
    loader = Loader(many_examples(), batch_size=5, shuffle=False)
    assert [sorted(labelled(loader.next_step())) for _ in range(3)] == [[*range(i, i + 5)] for i in (0, 5, 10)]
    packed = Loader(many_examples(), batch_size=1, shuffle=False, packed=True)
    rows = [labelled(packed.next_step()) for _ in range(packed.steps_per_epoch)]
    assert all(row == sorted(row) for row in rows)


def padding(loader: Loader) -> float:
    """Share of an epoch's positions that hold no token, from the batches themselves."""
    computed, epoch = 0, loader.epoch
    while loader.epoch == epoch:
        computed += sum(batch.tokens.numel() for batch in loader.next_step())
    return 1 - loader.examples.num_tokens / computed


def gsm8k_like(count: int = 2000) -> Examples:
    """Lengths of the mean (217) and deviation (73) that GSM8K has with the quickstart's tokenizer, cut at 384."""
    lengths = np.random.default_rng(0).lognormal(5.33, 0.33, count).clip(60, 384).astype(int)
    rows = [[([1] * (length + 1), [False] * length + [True])] for length in lengths.tolist()]
    return Examples.of("dataset", 384, rows)


@pytest.mark.parametrize(("batch_size", "accumulation", "bound"), [(4, 1, 0.05), (8, 1, 0.06), (4, 4, 0.02)])
def test_grouping_leaves_little_padding(batch_size: int, accumulation: int, bound: float) -> None:
    examples, sizes = gsm8k_like(), {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    loader = Loader(examples, **sizes)
    said = loader.summary()
    found = padding(loader)
    assert said == f"{found:.1%} padding in an epoch"
    assert found < bound
    random_loader = Loader(examples, group_by_length=False, **sizes)
    said = random_loader.summary()
    found = padding(random_loader)
    assert said == f"{found:.1%} padding in an epoch"
    assert found > 2 * bound


def test_grouped_steps_are_in_random_order_and_hold_all_lengths() -> None:
    examples = gsm8k_like()
    loader = Loader(examples, batch_size=4)
    means = [np.mean([batch.tokens.shape[1] for batch in loader.next_step()]) for _ in range(500)]
    assert abs(np.corrcoef(np.arange(500), means)[0, 1]) < 0.1
    first, second = np.array(means[:250]), np.array(means[250:])
    assert abs(first.mean() / second.mean() - 1) < 0.1  # three standard errors


def test_a_packed_summary_says_the_fill() -> None:
    examples = gsm8k_like()
    loader = Loader(examples, batch_size=4, packed=True)
    rows = sum(len(loader.next_step()[0].tokens) for _ in range(loader.steps_per_epoch))
    assert loader.summary().startswith("packed into 384 x ")
    loader = Loader(examples, batch_size=4, packed=True)
    assert (
        loader.summary() == f"packed into 384 x {rows:,} rows an epoch, {examples.num_tokens / rows / 384:.1%} filled"
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"packed": True, "group_by_length": True}, r"dataset.group_by_length=true is for rows of one document each"),
        ({"shuffle": False, "group_by_length": True}, r"dataset.group_by_length=true .* shuffle=false .* Leave one"),
    ],
)
def test_grouping_that_says_nothing_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(make_examples(), batch_size=2, **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [({"packed": True}, "dataset.packed .* changed"), ({"group_by_length": False}, "dataset.group_by_length changed")],
)
def test_resuming_with_other_rows_is_refused(how: dict[str, Any], message: str) -> None:
    state = Loader(make_examples(), batch_size=2).state_dict()
    with pytest.raises(ValueError, match=f"cannot continue in dataset: {message}"):
        Loader(make_examples(), batch_size=2, **how).load_state_dict(state)


def test_what_comes_next_can_be_seen_before() -> None:
    loader = Loader(make_examples(), batch_size=2, gradient_accumulation_steps=2, seed=3)
    for _ in range(7):
        place, upcoming = loader.place, loader.copy().next_step()
        assert loader.place == place
        assert snapshot(loader.next_step()) == snapshot(upcoming)


def test_batches_of_chosen_examples() -> None:
    examples, only = make_examples(), np.array([9, 0, 4, 5])
    for packed in (False, True):
        found = data.ValBatches(examples, 3, packed=packed, only=only)
        tokens = torch.cat([batch.tokens[batch.labels != IGNORE] for batch in found])
        assert sorted(tokens.tolist()) == [0, 4, 5, 9]


@pytest.mark.parametrize("num_slices", [1, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_keys_tell_which_label_of_which_example_a_position_is(packed: bool, num_slices: int) -> None:
    rows = [[([7, 8, 9, i, i + 1, 5], [False, False, i % 2 == 0, True, True, True])] for i in range(10, 17)]
    examples = Examples.of("dataset", 16, rows)
    expected = {
        (int(examples.ids[i]), place): int(label)
        for i in range(len(examples))
        for place, label in enumerate(x for x in examples[i][1] if x != IGNORE)
    }
    found = {}
    for slice in range(num_slices):
        share = data.Share(slice=slice, num_slices=num_slices)
        for batch in data.ValBatches(examples, 3, packed=packed, share=share):
            keys, labels = batch.keys(), batch.labels[batch.labels != IGNORE]
            pairs = zip(keys.examples.tolist(), keys.places.tolist(), strict=True)
            found.update(zip(pairs, labels.tolist(), strict=True))
    assert found == expected
    unscored = data.ValBatches(examples, 3, packed=packed, share=data.Share(is_scored=False))
    assert not any(len(batch.keys().examples) for batch in unscored)
