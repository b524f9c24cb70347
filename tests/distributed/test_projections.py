"""Distances between hidden states, and projections that are trained for them: steps are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file
from slow import marked, wanted
from steps import Lengths, check_same, resume, save_pair, train

from kdtune.distributed import ParallelConfig
from kdtune.losses import HiddenLossConfig
from kdtune.models import LoraConfig

LENGTHS: Lengths = (5, 1, (9, 3, 14))  # of which a process may have none, and a slice padding
PAIRS = [
    {"student": "model.embed_tokens", "teacher": "model.embed_tokens", "loss": "mse"},
    {"student": "model.layers.{0..1}", "teacher": "model.layers.{0..2..2}", "loss": "normalized_mse"},
    {"student": "model.layers.2.self_attn", "teacher": "model.layers.1.mlp", "loss": "smooth_l1"},
    {"student": "model.norm", "teacher": "model.norm"},
]
SHARED = {"hidden_loss": HiddenLossConfig(pairs=PAIRS, projection="shared", projection_init="orthogonal")}
EACH = {"hidden_loss": HiddenLossConfig(pairs=PAIRS, projection="per_pair", tokens="all")}
HEADS = [
    {"student": f"model.layers.1.self_attn.{x}", "teacher": f"model.layers.2.self_attn.{x}"}
    for x in ("keys", "queries")
]
RELATIONS = {"hidden_loss": HiddenLossConfig(pairs=HEADS, name="relation", relation_heads=3)}
LAYOUTS: dict[str, tuple[int, ParallelConfig, dict[str, Any]]] = {
    "sharded": (2, ParallelConfig(), SHARED),
    "offloaded": (2, ParallelConfig(offload=True), EACH),
    "adapter": (2, ParallelConfig(), EACH | {"lora": LoraConfig(rank=3), "optimizer_in_bwd": True}),
    "relations": (2, ParallelConfig(), RELATIONS),
    "tensor": (2, ParallelConfig(tensor=2), SHARED),
    "context": (2, ParallelConfig(context=2), EACH),
    "hybrid_tensor": (4, ParallelConfig(tensor=2, data_replicate=2), SHARED),
    "context_tensor": (4, ParallelConfig(context=2, tensor=2), SHARED),
}
SLOW = {"offloaded", "hybrid_tensor", "context_tensor"}


@pytest.fixture(scope="module")
def models(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pair(
        oracle, folder, student=("qwen3-tied_biases", {}), teacher=("llama", {"hidden_size": 128, "head_dim": 48})
    )
    return folder


def alone(name: str) -> str:
    settings = LAYOUTS[name][2]
    if settings is RELATIONS:
        return "relations_alone"
    return "adapter_alone" if "lora" in settings else "each_alone" if settings is EACH else "shared_alone"


def work(names: Sequence[str], size: int, models: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        of_size, parallel, settings = LAYOUTS[name]
        if of_size == size:
            found[name] = train(models, parallel, folder / name, LENGTHS, **settings)
            kept = folder / alone(name) / "kept"
            found[f"{name} from alone"] = resume(models, parallel, kept, folder / "resumed", LENGTHS, **settings)
    return found


NAMES = marked(LAYOUTS, SLOW)


@pytest.fixture(scope="module")
def found(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], Path]:
    """What the processes found; and the folder with what they wrote."""
    names = wanted(LAYOUTS, SLOW, request)
    folder = tmp_path_factory.mktemp("runs")
    one, numbers = ParallelConfig(), {}
    for name in ("sharded", "context", "adapter", "relations"):
        numbers[alone(name)] = train(models, one, folder / alone(name), LENGTHS, **LAYOUTS[name][2])
    for size in sorted({LAYOUTS[name][0] for name in names}):
        first, *others = ranks.run(size, work, folder, names, size, models, folder)
        for other in others:  # what is logged is the same on every process
            torch.testing.assert_close(other, first, rtol=0, atol=0)
        numbers |= first
    for name in names:
        kept = folder / name / "kept"
        numbers[f"alone from {name}"] = resume(models, one, kept, folder / "resumed", LENGTHS, **LAYOUTS[name][2])
    return numbers, folder


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_one_process(name: str, found: tuple[dict[str, Any], Path]) -> None:
    """And each goes on from the other's checkpoint, which has the projections."""
    numbers, folder = found
    expected = numbers[alone(name)]
    for way in (f"{name} from alone", f"alone from {name}"):
        torch.testing.assert_close(numbers[way], expected[1:], rtol=1e-9, atol=0)
    if "lora" in LAYOUTS[name][2]:
        torch.testing.assert_close(numbers[name], expected, rtol=1e-9, atol=0)
    else:
        check_same(numbers, folder, name, alone(name))


@pytest.mark.parametrize("name", NAMES)
def test_no_projection_is_in_what_is_written(name: str, found: tuple[dict[str, Any], Path]) -> None:
    _, folder = found
    files = [*(folder / name).glob("kept/*.safetensors"), *(folder / name).glob("[am]*/*.safetensors")]
    assert len(files) >= 2
    assert not [key for path in files for key in load_file(path) if "projection" in key or "beside" in key]
