"""Ranks that have slices of the same rows take the steps that one process takes with whole rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from steps import Lengths, Traffic, Training, check_same, resume, rows, save_pair, say, train

from kdtune import checkpoint
from kdtune.distributed import ParallelConfig

LENGTHS: Lengths = (5, 1, (9, 3, 14))  # no multiples of the slices, shorter than their number, packed; one for two
EVEN: Lengths = (8, 20, (9, 3, 14))  # where padding is no part of the length that dynamic rope goes by
CONTEXT = ParallelConfig(context=2)
FEW_HEADS = {"num_key_value_heads": 1, "num_hidden_layers": 1}
PAIRS = {
    "tied": (("qwen3-tied_biases", FEW_HEADS), ("llama", {"hidden_size": 128}), LENGTHS),
    "windows": (("qwen3-layer_types", {}), ("qwen2-sliding", {}), LENGTHS),
    "dynamic": (("llama-dynamic", {"num_hidden_layers": 1}), ("llama-dynamic", FEW_HEADS), EVEN),
}
RESUMED = {  # by number of processes: the run that goes on, and how
    1: [("tied_sliced", ParallelConfig())],
    2: [("tied_alone", CONTEXT)],
    4: [
        ("tied_sliced", ParallelConfig(context=4)),
        ("tied_sliced", ParallelConfig(context=2, data_shard=2)),
        ("tied_sliced", ParallelConfig(context=2, data_replicate=2)),
        ("windows_sliced", ParallelConfig(context=2, tensor=2)),
    ],
}


@pytest.fixture(scope="module")
def models(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with fewer key heads than slices, windows, and positions that depend on the length of the row."""
    folder = tmp_path_factory.mktemp("models")
    for pair, (student, teacher, _) in PAIRS.items():
        save_pair(oracle, folder / pair, student=student, teacher=teacher)
    return folder


def exchanged(models: Path, parallel: ParallelConfig) -> int:
    """Bytes of a step."""
    training = Training(models / "tied", parallel)
    with Traffic() as traffic:
        training.step(1, LENGTHS)
    return traffic.exchanged


def go_on(size: int, models: Path, folder: Path) -> list[list[list[float]]]:
    """In each layout, after the first step."""
    return [
        resume(models / run.split("_")[0], parallel, folder / run / "kept", folder / "resumed", LENGTHS)
        for run, parallel in RESUMED[size]
    ]


def work(size: int, models: Path, folder: Path) -> dict[str, Any]:
    """What one process of so many does."""
    found: dict[str, Any] = {f"resumed_{size}": go_on(size, models, folder)}
    if size == 2:
        for pair, (*_, lengths) in PAIRS.items():
            found[f"{pair}_sliced"] = train(models / pair, CONTEXT, folder / f"{pair}_sliced", lengths)
        found["says_sliced"] = say(Training(models / "windows", CONTEXT), LENGTHS, with_logits=False)
        found["exchanged"] = exchanged(models, CONTEXT)
    return found


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the processes found; and the folder with what they wrote."""
    folder = tmp_path_factory.mktemp("runs")
    one = ParallelConfig()
    numbers: dict[str, Any] = {
        f"{pair}_alone": train(models / pair, one, folder / f"{pair}_alone", lengths)
        for pair, (*_, lengths) in PAIRS.items()
    }
    numbers["says_alone"] = say(Training(models / "windows", one), LENGTHS, with_logits=False)
    for size in (2, 4):
        answers = ranks.run(size, work, folder, size, models, folder)
        assert all(answer == answers[0] for answer in answers), "what is logged is the same on every process"
        numbers |= answers[0]
    numbers["resumed_1"] = go_on(1, models, folder)
    return numbers, folder


@pytest.mark.parametrize("pair", PAIRS)
def test_steps_are_those_of_one_process(pair: str, found: tuple[dict[str, Any], Path]) -> None:
    numbers, folder = found
    sliced, alone = f"{pair}_sliced", f"{pair}_alone"
    check_same(numbers, folder, sliced, alone)


@pytest.mark.parametrize("size", RESUMED)
def test_a_run_goes_on_in_any_layout(size: int, found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    for values, (run, layout) in zip(numbers[f"resumed_{size}"], RESUMED[size], strict=True):
        expected = numbers[run.split("_")[0] + "_alone"][1:]
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=0, msg=str(layout))


def test_activations_computed_twice_and_what_the_models_say(found: tuple[dict[str, Any], Path]) -> None:
    for key, expected in found[0]["says_alone"].items():
        torch.testing.assert_close(found[0]["says_sliced"][key], expected, rtol=1e-9, atol=0)


def test_what_is_exchanged_is_what_the_documentation_says(models: Path, found: tuple[dict[str, Any], Path]) -> None:
    """Queries, keys, values and the result of each layer, of the positions that are here, of both models; and back."""
    positions = sum(2 * -(-batch.tokens.size(1) // 2) for batch in rows(1, LENGTHS))
    numbers = 0
    for role, passes in (("student", 2), ("teacher", 1)):
        config = checkpoint.load_model(models / "tied" / role, dtype=torch.float64, device="cpu").config
        heads = 2 * config.num_heads + 2 * max(config.num_kv_heads, 2)
        numbers += passes * config.num_layers * heads * config.head_dim
    assert found[0]["exchanged"] == 8 * positions * numbers
