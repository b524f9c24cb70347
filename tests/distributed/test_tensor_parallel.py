"""Ranks that split layers and vocabulary take the steps that one process takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from steps import Training, check_same, resume, save_pair, say, train

from kdtune.checkpoint import weights
from kdtune.distributed import ParallelConfig

LENGTHS = (5, 1, 24)  # of the rows of a step, of which a process may have none
TENSOR = ParallelConfig(tensor=2)
PAIRS = {
    "tied": (("qwen3-tied_biases", {}), ("llama", {"vocab_size": 101, "hidden_size": 128})),
    "untied": (("llama-biases", {"vocab_size": 104}), ("qwen2-sliding", {})),
    "taught_by_tied": (("qwen3-layer_types", {"vocab_size": 99}), ("llama-tied", {"vocab_size": 98})),
}


@pytest.fixture(scope="module")
def models(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with biases, norms of heads, windows, and vocabularies of which either may be larger."""
    folder = tmp_path_factory.mktemp("models")
    for pair, (student, teacher) in PAIRS.items():
        save_pair(oracle, folder / pair, student=student, teacher=teacher)
    return folder


@contextmanager
def counting() -> Iterator[list[int]]:
    """The bytes of each read of weights."""
    read, sizes = weights._read_exactly, []

    def count(stream: Any, view: memoryview, file: Path) -> None:
        sizes.append(len(view))
        read(stream, view, file)

    weights._read_exactly = count
    yield sizes
    weights._read_exactly = read


def load_and_say(models: Path, parallel: ParallelConfig) -> dict[str, Any]:
    """What the models say, and the share of bytes that were read."""
    with counting() as sizes:
        training = Training(models / "untied", parallel)
    stored = sum(path.stat().st_size for path in (models / "untied").glob("*/*.safetensors"))
    return {"share": sum(sizes) / stored, **say(training, LENGTHS)}


def work(size: int, models: Path, folder: Path) -> dict[str, Any]:
    """What one process of so many does, one layout after the other."""
    found: dict[str, Any] = {}
    tied, kept = models / "tied", folder / "tied_tensor_2" / "kept"
    if size == 2:
        for pair in PAIRS:
            found[f"{pair}_tensor_2"] = train(models / pair, TENSOR, folder / f"{pair}_tensor_2", LENGTHS)
        kept_alone = folder / "tied_alone_1" / "kept"
        found["resumed: one to tensor"] = resume(tied, TENSOR, kept_alone, folder / "resumed", LENGTHS)
        found["resumed: tensor to sharded"] = resume(tied, ParallelConfig(), kept, folder / "resumed", LENGTHS)
        found["says_2"] = load_and_say(models, TENSOR)
    else:
        found["tied_tensor_4"] = train(tied, TENSOR, folder / "tied_tensor_4", LENGTHS)
        hybrid = ParallelConfig(tensor=2, data_replicate=2)
        found["resumed: tensor to hybrid"] = resume(tied, hybrid, kept, folder / "resumed", LENGTHS)
    return found


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the processes found; and the folder with what they wrote."""
    folder = tmp_path_factory.mktemp("runs")
    one = ParallelConfig()
    numbers: dict[str, Any] = {
        f"{pair}_alone_1": train(models / pair, one, folder / f"{pair}_alone_1", LENGTHS) for pair in PAIRS
    }
    numbers["says_1"] = load_and_say(models, one)
    for size in (2, 4):
        answers = ranks.run(size, work, folder, size, models, folder)
        if size == 2:
            numbers["shares"] = [answer["says_2"].pop("share") for answer in answers]
        for answer in answers:  # what is logged is the same on every process
            torch.testing.assert_close(answer, answers[0], rtol=0, atol=0)
        numbers |= answers[0]
        kept = folder / f"tied_tensor_{size}" / "kept"
        numbers[f"resumed: tensor of {size} to one"] = resume(models / "tied", one, kept, folder / "resumed", LENGTHS)
    return numbers, folder


@pytest.mark.parametrize("run", [*(f"{pair}_tensor_2" for pair in PAIRS), "tied_tensor_4"])
def test_steps_are_those_of_one_process(run: str, found: tuple[dict[str, Any], Path]) -> None:
    numbers, folder = found
    alone = run[: run.index("_tensor")] + "_alone_1"
    check_same(numbers, folder, run, alone)


def test_a_run_goes_on_in_any_layout(found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    resumed = {name: values for name, values in numbers.items() if name.startswith("resumed: ")}
    assert len(resumed) == 5
    for name, values in resumed.items():
        expected = numbers["tied_alone_1"][1:]
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=0, msg=name)


def test_what_the_models_say(found: tuple[dict[str, Any], Path]) -> None:
    """With activations computed twice; logits of the whole vocabulary, and greedy continuations."""
    split, alone = found[0]["says_2"], found[0]["says_1"]
    for key, expected in split.items():
        torch.testing.assert_close(alone[key], expected, rtol=1e-9, atol=1e-12)


def test_a_rank_reads_its_share(found: tuple[dict[str, Any], Path]) -> None:
    """Columns of a matrix, too, without what lies between them."""
    assert 0.95 < found[0]["says_1"]["share"] < 1
    assert all(0.45 < share < 0.52 for share in found[0]["shares"])
