"""Blocks that learn from the teacher's inputs: steps are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from slow import marked, wanted
from steps import Lengths, check_same, resume, save_pair, train

from kdtune.distributed import ParallelConfig
from kdtune.losses import HiddenLossConfig

LENGTHS: Lengths = (5, 1, (9, 3, 14))  # of which a process may have none, and a slice padding
PAIRS = [
    {"student": "model.embed_tokens", "teacher": "model.embed_tokens", "loss": "mse"},
    {"student": "model.layers.0", "teacher": "model.layers.1", "loss": "none"},
    {"student": "model.layers.2", "teacher": "model.layers.3", "loss": "normalized_mse"},
]
SETTINGS: dict[str, Any] = {"hidden_loss": HiddenLossConfig(pairs=PAIRS, inputs="teacher", tokens="all")}
LAYOUTS = {
    "sharded": ParallelConfig(),
    "replicated": ParallelConfig(data_replicate=2),
    "tensor": ParallelConfig(tensor=2),
    "context": ParallelConfig(context=2),
}
SLOW = {"replicated"}


def work(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        parallel = LAYOUTS[name]
        found[name] = train(folder, parallel, folder / name, LENGTHS, **SETTINGS)
        kept = folder / "alone" / "kept"
        found[f"{name} from alone"] = resume(folder, parallel, kept, folder / "resumed", LENGTHS, **SETTINGS)
    return found


@pytest.fixture(scope="module")
def found(
    oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], Path]:
    """What the processes found; and the folder with what they wrote."""
    folder = tmp_path_factory.mktemp("runs")
    save_pair(oracle, folder, student=("qwen3", {}), teacher=("llama", {"num_hidden_layers": 4}))
    alone = train(folder, ParallelConfig(), folder / "alone", LENGTHS, **SETTINGS)
    first, other = ranks.run(2, work, folder, folder, wanted(LAYOUTS, SLOW, request))
    torch.testing.assert_close(other, first, rtol=0, atol=0)
    return {"alone": alone} | first, folder


@pytest.mark.parametrize("name", marked(LAYOUTS, SLOW))
def test_steps_are_those_of_one_process(name: str, found: tuple[dict[str, Any], Path]) -> None:
    """And go on from its checkpoint, in which the layer that is compared with nothing has no state."""
    numbers, folder = found
    check_same(numbers, folder, name, "alone")
    torch.testing.assert_close(numbers[f"{name} from alone"], numbers["alone"][1:], rtol=1e-9, atol=0)
