"""Models that several processes hold together take the steps that one process takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file
from steps import LENGTHS, Traffic, Training, resume, train

from kdtune import checkpoint, distributed
from kdtune.checkpoint import weights
from kdtune.distributed import ParallelConfig
from kdtune.models import from_hf_config, parameter_shapes

LAYOUTS = {  # by number of processes
    2: {"sharded": ParallelConfig(), "kept": ParallelConfig(reshard_after_forward=False)},
    4: {"sharded": ParallelConfig(), "hybrid": ParallelConfig(data_replicate=2)},
}


@pytest.fixture(scope="module")
def models(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a tied head and a teacher without; some weights have fewer rows than there are processes."""
    folder = tmp_path_factory.mktemp("models")
    oracle("qwen3", tie_word_embeddings=True).save_pretrained(folder / "student")
    oracle("llama", hidden_size=128, num_key_value_heads=1).save_pretrained(folder / "teacher")
    return folder


def most_bytes_read(models: Path) -> float:
    """Of the teacher's weights, by one process."""
    ranks = distributed.join(ParallelConfig(), "cpu")
    pieces: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        read = weights._read_exactly
        patch.setattr(weights, "_read_exactly", lambda *args: (pieces.append(len(args[1])), read(*args)))
        shard = distributed.sharding(ranks, ParallelConfig(), trains=False)
        checkpoint.load_model(models / "teacher", dtype=torch.bfloat16, device="cpu", shard=shard)
    return ranks.most(sum(pieces))


def traffic(models: Path, parallel: ParallelConfig) -> list[int]:
    """Of a step."""
    training = Training(models, parallel)
    training.step(1)
    with Traffic() as traffic:
        training.step(2)
    return [traffic.gathered, traffic.scattered]


def work(size: int, models: Path, folder: Path) -> dict[str, Any]:
    """What one process of so many does, one layout after the other."""
    found: dict[str, Any] = {"most bytes read": most_bytes_read(models)}
    for name, parallel in LAYOUTS[size].items():
        found[f"traffic {name}"] = traffic(models, parallel)
        found[name] = train(models, parallel, folder / f"{name}_{size}")
    starts = sorted(folder.glob("*/kept"))
    for start in starts:
        found[f"from {start.parent.name}"] = resume(models, ParallelConfig(), start, folder / "resumed")
    return found


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """By layout and number of processes, what they found; and the folder with what they wrote."""
    folder = tmp_path_factory.mktemp("runs")
    numbers = {"alone_1": train(models, ParallelConfig(), folder / "alone_1")}
    for size in LAYOUTS:
        first, *others = ranks.run(size, work, folder, size, models, folder)
        assert all(other == first for other in others), "what is logged is the same on every process"
        numbers |= {f"{name}_{size}": values for name, values in first.items()}
    for start in sorted(folder.glob("*/kept")):
        numbers[f"from {start.parent.name}_1"] = resume(models, ParallelConfig(), start, folder / "resumed")
    return numbers, folder


RUNS = [f"{name}_{size}" for size, layouts in LAYOUTS.items() for name in layouts]


@pytest.mark.parametrize("run", RUNS)
def test_steps_are_those_of_one_process(run: str, found: tuple[dict[str, Any], Path]) -> None:
    numbers, folder = found
    torch.testing.assert_close(torch.tensor(numbers[run]), torch.tensor(numbers["alone_1"]), rtol=1e-9, atol=0)
    weights, expected = (
        checkpoint.load_model(folder / name / "model", dtype=torch.float64, device="cpu").state_dict()
        for name in (run, "alone_1")
    )
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, *LAYOUTS])
@pytest.mark.parametrize("start", ["alone_1", *(f"{name}_2" for name in LAYOUTS[2])])
def test_a_run_goes_on_with_any_number_of_processes(start: str, size: int, found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    resumed, expected = (torch.tensor(numbers[name]) for name in (f"from {start}_{size}", "alone_1"))
    torch.testing.assert_close(resumed, expected[1:], rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", LAYOUTS)
def test_a_process_reads_its_own_part(size: int, models: Path, found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    total = sum(weight.nbytes for weight in load_file(models / "teacher" / "model.safetensors").values())
    assert total / size <= numbers[f"most bytes read_{size}"] < 1.05 * total / size


@pytest.mark.parametrize("run", RUNS)
def test_what_crosses_is_what_the_documentation_says(
    run: str, models: Path, found: tuple[dict[str, Any], Path]
) -> None:
    """For each micro-batch a forward of both models, and a backward; the gradient once a step."""
    numbers, _ = found
    name, size = run.split("_")
    rows_per_step = -(-len(LENGTHS) // int(size))

    def num_bytes(model: str, *, layers: bool) -> int:
        shapes = parameter_shapes(from_hf_config(checkpoint.read_config(models / model)))
        kept = ("lm_head.weight", "model.norm.weight", *(["model.embed_tokens.weight"] * (model == "student")))
        return 8 * sum(torch.Size(shape).numel() for key, shape in shapes.items() if (key not in kept) == layers)

    of_layers, of_rest = (num_bytes("student", layers=layers) for layers in (True, False))
    passes = 1 if name == "kept" else 2
    gathered = rows_per_step * (passes * of_layers + of_rest + num_bytes("teacher", layers=True))
    assert numbers[f"traffic {run}"] == pytest.approx([gathered, of_layers + of_rest], rel=0.03), "but for padding"


@pytest.mark.parametrize("run", RUNS)
def test_files_are_written_by_all(run: str, found: tuple[dict[str, Any], Path]) -> None:
    """And none is much larger than the share of a process."""
    _, folder = found
    files = list((folder / run / "model").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    assert len(sizes) >= int(run[-1])
    largest = max(weight.nbytes for path in files for weight in load_file(path).values())
    assert max(sizes) < sum(sizes) / int(run[-1]) + largest


@pytest.mark.parametrize(
    ("parallel", "size"),
    [(ParallelConfig(data_replicate=3), 4), (ParallelConfig(data_shard=2), 1), (ParallelConfig(data_replicate=4), 2)],
)
def test_a_layout_for_another_number_of_processes(parallel: ParallelConfig, size: int) -> None:
    with pytest.raises(ValueError, match="every process has one place"):
        distributed.check_layout(parallel, size)
