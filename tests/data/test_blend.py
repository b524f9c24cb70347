"""Several sources as one: every prefix of the order keeps the weights, and no example is lost or repeated early."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

from kdtune import data
from kdtune.data.blend import Blend
from kdtune.data.examples import Examples
from kdtune.data.loader import _STEPS_PER_GROUP


def make_examples(name: str, size: int) -> Examples:
    """Of two to six tokens, no two alike."""
    return Examples.of(name, 16, [[([i % 997, *range(2 + i % 5)], [True] * (3 + i % 5))] for i in range(size)])


def make_blend(sizes: dict[str, int], weights: dict[str, float] | None = None) -> Blend:
    sources = {name: make_examples(name, size) for name, size in sizes.items()}
    return Blend("dataset", sources, weights)


CASES = [
    ({"a": 7, "b": 50, "c": 3}, {"a": 0.5, "b": 0.3, "c": 0.2}),
    ({"a": 7, "b": 50, "c": 3}, None),
    ({"a": 1, "b": 1}, {"a": 1.0, "b": 1e-3}),
    ({"a": 13}, {"a": 3.0}),
    ({"a": 10, "b": 10, "c": 10, "d": 11}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}),
    ({f"s{i}": 3 + i for i in range(20)}, {f"s{i}": 19.0 if i == 0 else 1.0 for i in range(20)}),
]


@pytest.mark.parametrize(("sizes", "weights"), CASES)
@pytest.mark.parametrize("seed", [None, 5])
def test_every_prefix_has_the_weights(sizes: dict[str, int], weights: Any, seed: int | None) -> None:
    blend = make_blend(sizes, weights)
    draws = np.concatenate([blend.order(epoch, seed) for epoch in range(20)])
    of_source = blend.source_of(draws)[:, None] == np.arange(len(sizes))  # [n, s]
    counts = of_source.cumsum(0)
    wanted = np.arange(1, len(draws) + 1)[:, None] * blend.weights
    assert (np.abs(counts - wanted) <= 0.5 + blend.weights * len(sizes) / 2).all()
    if len(sizes) < 5:
        assert np.abs(counts - wanted).max() < 1
    for count in (0, 1, 9, 17, len(draws)):
        assert blend.num_draws(count).tolist() == of_source[:count].sum(0).tolist()


@pytest.mark.parametrize(("sizes", "weights"), CASES)
def test_a_source_repeats_nothing_before_it_has_shown_everything(sizes: dict[str, int], weights: Any) -> None:
    blend = make_blend(sizes, weights)
    draws = np.concatenate([blend.order(epoch, 3) for epoch in range(20)])
    start = 0
    for source, size in enumerate(sizes.values()):
        own = draws[blend.source_of(draws) == source]
        for turn in range(0, len(own) - size + 1, size):
            assert sorted(own[turn : turn + size]) == list(range(start, start + size))
        start += size


def test_without_weights_an_epoch_is_all_of_it_once() -> None:
    blend = make_blend({"a": 7, "b": 50, "c": 3})
    for epoch in range(3):
        assert sorted(blend.order(epoch, 1)) == list(range(60))
    assert not np.array_equal(blend.order(0, 1), blend.order(1, 1))
    assert np.array_equal(blend.order(2, 1), blend.order(2, 1))
    assert not np.array_equal(blend.order(0, 1), blend.order(0, 2))


def test_reads_as_its_sources() -> None:
    blend = make_blend({"a": 7, "b": 5})
    rows = [source[i] for source in blend.sources.values() for i in range(len(source))]
    for i, (tokens, labels) in enumerate(rows):
        assert torch.equal(blend[i][0], tokens)
        assert torch.equal(blend[i][1], labels)
        assert blend.lengths[i] == len(tokens)
    assert blend.num_tokens == sum(len(tokens) for tokens, _ in rows)
    assert blend.counts.num_rows == 12
    with pytest.raises(IndexError):
        blend[12]
    changed = make_blend({"a": 7, "b": 5}, {"a": 1.0, "b": 2.0})
    assert changed.fingerprint != blend.fingerprint == make_blend({"a": 7, "b": 5}).fingerprint


@pytest.mark.parametrize(("how", "bound"), [({"packed": True}, 48), ({}, 2), ({"group_by_length": True}, 48)], ids=str)
def test_the_loader_counts_epochs_of_each_source(how: dict[str, bool], bound: int) -> None:
    blend = make_blend({"a": 8, "b": 40}, {"a": 0.5, "b": 0.5})
    loader = data.Loader(blend, batch_size=3, **how)
    seen: Counter[str] = Counter()
    for _ in range(40):
        rows = loader._rows  # of the present epoch, before the step may begin another
        first = loader._position
        count = sum(len(batch.tokens) for batch in loader.next_step())
        for row in range(first, first + count):
            seen.update("ab"[source] for source in blend.source_of(rows[row]))
        assert loader.source_epochs() == pytest.approx({"a": seen["a"] / 8, "b": seen["b"] / 40})
    assert abs(seen["a"] - seen["b"]) < bound, "draws of an epoch are packed or grouped together"


def test_stopped_and_resumed_sees_the_same() -> None:
    def loader() -> data.Loader:
        return data.Loader(make_blend({"a": 8, "b": 40}, {"a": 0.7, "b": 0.3}), batch_size=3, seed=4)

    whole, first = loader(), loader()
    steps = [whole.next_step() for _ in range(50)]
    for _ in range(23):
        first.next_step()
    second = loader()
    second.load_state_dict(first.state_dict())
    for expected in steps[23:]:
        for batch, other in zip(second.next_step(), expected, strict=True):
            assert torch.equal(batch.tokens, other.tokens)


def test_a_source_is_shuffled_by_numbers_of_its_own() -> None:
    """Those that group rows by length come of (seed, epoch, steps of a group)."""
    blend, turn = make_blend({"a": 30}), _STEPS_PER_GROUP
    assert sorted(blend.order(turn, 5)) == list(range(30))
    assert blend.order(turn, 5).tolist() != np.random.default_rng([5, 0, turn]).permutation(30).tolist()


def blended(tiny: Path, *names: str) -> list[str]:
    for i, name in enumerate(names):
        tiny_runs.write_rows(tiny / f"{name}.jsonl", 6 + 4 * i)
    common = [("source", "{}.jsonl"), ("format", "completion")]
    return [
        f"dataset.sources.{name}.{key}={tiny / value.format(name) if key == 'source' else value}"
        for name in names
        for key, value in common
    ]


@pytest.mark.parametrize("run", [tiny_runs.distil, tiny_runs.finetune])
def test_a_run_on_a_blend(run: Any, tiny: Path, tmp_path: Path) -> None:
    settings = blended(tiny, "math", "code")
    validation = [setting.replace("dataset.", "dataset_val.", 1) for setting in settings]
    weights = ["dataset.sources.math.weight=3", "dataset.sources.code.weight=1"]
    output = run(
        tiny, tmp_path / "run", "dataset.source=null", "dataset.format=instruct", *settings, *validation, *weights
    )
    last = tiny_runs.steps(output)[-1]
    # Three epochs of 16 draws, three quarters of them from 6 rows and one from 10.
    assert last["epochs/math"] == pytest.approx(36 / 6)
    assert last["epochs/code"] == pytest.approx(12 / 10)
    for line in (line for line in tiny_runs.lines(output) if any(key.startswith("val_") for key in line)):
        key = "val_ce_loss" if run is tiny_runs.distil else "val_loss"
        assert min(line[f"{key}/math"], line[f"{key}/code"]) < line[key] < max(line[f"{key}/math"], line[f"{key}/code"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dataset.format=chat"], "dataset.format says nothing about the blend in dataset.sources"),
        (["dataset.source=other.jsonl"], "dataset.source says nothing about the blend"),
        (["dataset.sources.math.weight=1"], "dataset.sources.code has no weight, and others have one"),
        (["dataset.sources.more.format=chat"], "dataset.sources.more has no rows: give dataset.sources.more.source="),
    ],
)
def test_refusals(settings: list[str], message: str, tiny: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["dataset.source=null", "dataset.format=instruct", *blended(tiny, "math", "code")]
    with pytest.raises(SystemExit):
        tiny_runs.distil(tiny, tmp_path / "run", *base, *settings)
    assert message in capsys.readouterr().err


def test_an_epoch_of_a_blend_cannot_end_early() -> None:
    with pytest.raises(ValueError, match="max_steps_per_epoch=2 would leave out"):
        data.Loader(make_blend({"a": 8, "b": 40}), batch_size=3, max_steps_per_epoch=2)
