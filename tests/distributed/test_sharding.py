"""Models that several processes hold together take the steps that one process takes."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ranks
import torch
from safetensors.torch import load_file
from slow import marked, wanted
from steps import LENGTHS, Traffic, Training, check_same, contents, resume, train, write

from kdtune import checkpoint, distributed, metrics
from kdtune.checkpoint import weights
from kdtune.checkpoint.state import Run
from kdtune.distributed import ParallelConfig, Ranks
from kdtune.models import LoraConfig, QATConfig, from_hf_config, parameter_shapes, trained_shapes

LAYOUTS = {  # by number of processes
    2: {
        "sharded": ParallelConfig(),
        "kept": ParallelConfig(reshard_after_forward=False),
        "offloaded": ParallelConfig(offload=True),
    },
    4: {"sharded": ParallelConfig(), "hybrid": ParallelConfig(data_replicate=2)},
}
STARTS = ["alone_1", "sharded_2", "kept_2"]  # from whose checkpoints all go on
FEW = (5, 17)  # rows of a step, of which a process may have none
EMBEDDING_TOO = {"use_rslora": True, "target_modules": ["all-linear", "embed_tokens"]}
WHOLE_TOO = {"use_dora": True, "modules_to_save": ["embed_tokens", "v_proj", "input_layernorm"]}
WAYS: dict[str, tuple[int, ParallelConfig, dict[str, Any]]] = {  # what else is trained, and by how many processes
    "adapter": (2, ParallelConfig(), {"lora": LoraConfig(rank=3, save_merged=True, **EMBEDDING_TOO)}),
    "quantised": (2, ParallelConfig(), {"lora": LoraConfig(rank=3, base_quantization="int8"), "dtype": torch.float32}),
    "head": (2, ParallelConfig(), {"student": "teacher", "lora": LoraConfig(rank=4, target_modules=["lm_head"])}),
    "in_backward": (4, ParallelConfig(data_replicate=2), {"optimizer_in_bwd": True}),
    # Of two rows a sum is the same in any order, and the norm, which differs in its last bit, clips nothing: what is
    # beside the border of an integer would be on its other side.
    "rounded": (2, ParallelConfig(), {"qat": QATConfig(), "optimizer_in_bwd": True, "dtype": torch.float32}),
    "away": (2, ParallelConfig(offload=True), {"lora": LoraConfig(rank=3, **WHOLE_TOO), "optimizer_in_bwd": True}),
    "dora": (4, ParallelConfig(data_replicate=2), {"lora": LoraConfig(rank=3, save_merged=True, **WHOLE_TOO)}),
}
SLOW = {"sharded_4", "in_backward", "dora"}  # of four processes: what two do, too, or one that is hybrid


@pytest.fixture(scope="module")
def models(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a tied head and a teacher without; some weights have fewer rows than there are processes."""
    folder = tmp_path_factory.mktemp("models")
    oracle("qwen3", tie_word_embeddings=True).save_pretrained(folder / "student")
    oracle("llama", hidden_size=128, num_key_value_heads=1).save_pretrained(folder / "teacher")
    write_zeros(folder / "zeros")
    return folder


def write_zeros(folder: Path) -> None:
    """A model of 190 MB in bf16, which takes no room on the disk."""
    config = {"model_type": "llama", "vocab_size": 60_000, "hidden_size": 1024, "intermediate_size": 4096}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 8, "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in parameter_shapes(from_hf_config(config)).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


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


class Nothing:
    """What is trained, of which nothing is written."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def trained(self) -> dict[str, torch.Tensor]:
        return {}

    def write(self, folder: Path, trained: Any, ranks: Ranks) -> None: ...


def draw(folder: Path) -> list[list[float]]:
    """What each process draws after a checkpoint, and what it draws when it goes on from there."""
    ranks = distributed.join(ParallelConfig(), "cpu")
    torch.manual_seed(ranks.rank)
    start = Run(folder, None, Nothing(ranks)).save()
    drawn = torch.rand(1).item()
    Run(folder, start, Nothing(ranks))
    return ranks.gather([drawn, torch.rand(1).item()])


def growth(folder: Path) -> list[float]:
    """Of the memory of each process while it loads its part of a model of 190 MB, to all of the model."""
    ranks = distributed.join(ParallelConfig(), "cpu")
    shapes = parameter_shapes(from_hf_config(checkpoint.read_config(folder)))
    total = 2 * sum(map(math.prod, shapes.values()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = psutil.Process().memory_info().rss
    shard = distributed.sharding(ranks, ParallelConfig(), trains=False)
    checkpoint.load_model(folder, dtype=torch.bfloat16, device="cpu", shard=shard)
    return ranks.gather((metrics.peak_memory_gib(ranks.device) * 2**30 - before) / total)


def fill_disk(models: Path, folder: Path) -> list[str]:
    """What is said where the disk of one process is full: for weights, and for the optimizer's state."""
    training = Training(models, ParallelConfig())
    training.step(1)
    said = []
    for model in (write(training), Nothing(training.ranks)):
        run = Run(folder / "full", None, model, optimizer=training.optimizer)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not training.ranks.is_first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        run.save(in_background=True)
        training.step(2)
        with pytest.raises(OSError, match="could not be written") as raised:
            run.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said.append(str(raised.value))
    return said


def work(size: int, models: Path, folder: Path, left_out: set[str]) -> dict[str, Any]:
    """What one process of so many does, one layout after the other."""
    found: dict[str, Any] = {"most bytes read": most_bytes_read(models), "drawn": draw(folder / f"drawn_{size}")}
    if sys.platform == "linux":
        found["growth"] = growth(models / "zeros")  # after another was loaded, which imports what it needs
    for name, parallel in LAYOUTS[size].items():
        if f"{name}_{size}" in left_out:
            continue
        traffic = Traffic()
        found[name] = train(models, parallel, folder / f"{name}_{size}", traffic=traffic)
        found[f"traffic {name}"] = [traffic.gathered, traffic.scattered]
    for name, (of_size, parallel, settings) in WAYS.items():
        if of_size == size and name not in left_out:
            traffic = Traffic()
            found[name] = train(models, parallel, folder / f"{name}_{size}", FEW, traffic, **settings)
            found[f"traffic {name}"] = [traffic.gathered, traffic.scattered]
            found[f"from {name}"] = resume(
                models, parallel, folder / f"{name}_1" / "kept", folder / "resumed", FEW, **settings
            )
    if size == 2:
        found["full"] = fill_disk(models, folder)
    starts = STARTS if size == 2 or not left_out else ["sharded_2"]
    return found | {
        f"from {run}": resume(models, ParallelConfig(), folder / run / "kept", folder / "resumed") for run in starts
    }


@pytest.fixture(scope="module")
def found(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], Path]:
    """By layout and number of processes, what they found; and the folder with what they wrote."""
    left_out = SLOW.difference(wanted(SLOW, SLOW, request))
    ways = {name: way for name, way in WAYS.items() if name not in left_out}
    folder = tmp_path_factory.mktemp("runs")
    numbers = {"alone_1": train(models, ParallelConfig(), folder / "alone_1")}
    for name, (*_, settings) in ways.items():
        numbers[f"{name}_1"] = train(models, ParallelConfig(), folder / f"{name}_1", FEW, **settings)
    for size in LAYOUTS:
        first, *others = ranks.run(size, work, folder, size, models, folder, left_out)
        assert all(other == first for other in others), "what is logged is the same on every process"
        numbers |= {f"{name}_{size}": values for name, values in first.items()}
    one, resumed = ParallelConfig(), folder / "resumed"
    for run in STARTS:
        numbers[f"from {run}_1"] = resume(models, one, folder / run / "kept", resumed)
    for name, (size, _, settings) in ways.items():
        kept = folder / f"{name}_{size}" / "kept"
        numbers[f"from {name}_1"] = resume(models, one, kept, resumed, FEW, **settings)
    return numbers, folder


RUNS = marked([f"{name}_{size}" for size, layouts in LAYOUTS.items() for name in layouts], SLOW)


@pytest.mark.parametrize("run", RUNS)
def test_steps_are_those_of_one_process(run: str, found: tuple[dict[str, Any], Path]) -> None:
    numbers, folder = found
    check_same(numbers, folder, run, "alone_1")


def test_where_parts_lie_changes_no_bit(found: tuple[dict[str, Any], Path]) -> None:
    """What FSDP does of `parallel.offload` without a GPU; tests/gpu has the rest, and a plan says what lies where."""
    numbers, folder = found
    assert numbers["offloaded_2"] == numbers["sharded_2"]
    assert numbers["traffic offloaded_2"] == numbers["traffic sharded_2"]
    for name in ("model", "kept"):
        assert contents(folder / "offloaded_2" / name) == contents(folder / "sharded_2" / name)


@pytest.mark.parametrize(
    ("start", "size"),
    [
        pytest.param(start, size, marks=[pytest.mark.slow] if size == 4 and start != "sharded_2" else [])
        for start in STARTS
        for size in (1, *LAYOUTS)
    ],
)
def test_a_run_goes_on_with_any_number_of_processes(start: str, size: int, found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    resumed, expected = (numbers[name] for name in (f"from {start}_{size}", "alone_1"))
    torch.testing.assert_close(resumed, expected[1:], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", marked(WAYS, SLOW))
def test_what_else_is_trained(name: str, found: tuple[dict[str, Any], Path]) -> None:
    """Steps, and what is written, are those of one process; and each goes on from the other's checkpoint."""
    numbers, folder = found
    size, _, settings = WAYS[name]
    close = {"rtol": 1e-4, "atol": 1e-5} if "dtype" in settings else {"rtol": 1e-9, "atol": 1e-12}
    expected = numbers[f"{name}_1"]
    torch.testing.assert_close(numbers[f"{name}_{size}"], expected, **close)
    for resumed_by in (1, size):  # what the other left
        torch.testing.assert_close(numbers[f"from {name}_{resumed_by}"], expected[1:], **close)
    for kind in ("adapter", "model"):
        weights, others = (stored(folder / run / kind) for run in (f"{name}_{size}", f"{name}_1"))
        assert weights.keys() == others.keys()
        for key, weight in others.items():
            exact = {"rtol": 0, "atol": 0}
            torch.testing.assert_close(weights[key], weight, **(close if weight.is_floating_point() else exact))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, which may not be there."""
    return {key: weight for path in folder.glob("*.safetensors") for key, weight in load_file(path).items()}


@pytest.mark.parametrize("name", marked(["adapter", "quantised", "dora"], SLOW))
def test_nothing_of_frozen_weights_is_reduced(name: str, models: Path, found: tuple[dict[str, Any], Path]) -> None:
    """And where each process has them, they are not gathered."""
    size, _, settings = WAYS[name]
    gathered, scattered = found[0][f"traffic {name}_{size}"]
    config = from_hf_config(checkpoint.read_config(models / "student"))
    shapes = trained_shapes(config, settings["lora"]).values()
    num_trained = sum(-(-rows // 2) * 2 * math.prod(others) for rows, *others in shapes)  # as much for both of a group
    itemsize = settings.get("dtype", torch.float64).itemsize
    assert scattered == itemsize * num_trained
    if name == "quantised":
        rows_per_step = -(-len(FEW) // size)
        trained_and_teacher = 2 * num_trained + num_gathered(models, "teacher", layers=True)
        assert gathered == pytest.approx(rows_per_step * itemsize * trained_and_teacher, rel=0.03)


def test_each_process_goes_on_with_its_own_random_numbers(found: tuple[dict[str, Any], Path]) -> None:
    drawn = found[0]["drawn_4"]
    assert all(before == after for before, after in drawn)
    assert len({before for before, _ in drawn}) == 4


@pytest.mark.parametrize("size", LAYOUTS)
def test_a_process_reads_its_own_part(size: int, models: Path, found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    total = sum(weight.nbytes for weight in load_file(models / "teacher" / "model.safetensors").values())
    assert total / size <= numbers[f"most bytes read_{size}"] < 1.05 * total / size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", LAYOUTS)
def test_a_process_takes_memory_for_its_own_part(size: int, found: tuple[dict[str, Any], Path]) -> None:
    numbers, _ = found
    assert all(1 / size <= grown < 1 / size + 0.04 for grown in numbers[f"growth_{size}"])


@pytest.mark.parametrize("run", RUNS)
def test_what_crosses_is_what_the_documentation_says(
    run: str, models: Path, found: tuple[dict[str, Any], Path]
) -> None:
    """For each micro-batch a forward of both models, and a backward; the gradient once a step."""
    numbers, _ = found
    name, size = run.split("_")
    rows_per_step = -(-len(LENGTHS) // int(size))

    of_layers, of_rest = (8 * num_gathered(models, "student", layers=layers) for layers in (True, False))
    passes = 1 if name == "kept" else 2
    gathered = rows_per_step * (passes * of_layers + of_rest + 8 * num_gathered(models, "teacher", layers=True))
    assert numbers[f"traffic {run}"] == pytest.approx([gathered, of_layers + of_rest], rel=0.03), "but for padding"


def num_gathered(models: Path, model: str, *, layers: bool) -> int:
    """Weights of its layers, or of what stays gathered."""
    shapes = parameter_shapes(from_hf_config(checkpoint.read_config(models / model)))
    kept = ("lm_head.weight", "model.norm.weight", *(["model.embed_tokens.weight"] * (model == "student")))
    return sum(torch.Size(shape).numel() for key, shape in shapes.items() if (key not in kept) == layers)


@pytest.mark.parametrize("run", RUNS)
def test_files_are_written_by_all(run: str, found: tuple[dict[str, Any], Path]) -> None:
    """And none is much larger than the share of a process."""
    _, folder = found
    files = list((folder / run / "model").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    assert len(sizes) >= int(run[-1])
    largest = max(weight.nbytes for path in files for weight in load_file(path).values())
    assert max(sizes) < sum(sizes) / int(run[-1]) + largest


def test_a_full_disk_of_one_process_is_said_by_all(found: tuple[dict[str, Any], Path]) -> None:
    numbers, folder = found
    of_weights, of_state = numbers["full_2"]
    assert re.search(r"model-0000\d-of-0000\d.safetensors: .*File too large", of_weights)
    assert re.search(r"optimizer: .*File too large", of_state)
    assert not list((folder / "full" / "checkpoints").glob("step_*")), "nothing looks complete"


@pytest.mark.parametrize(
    ("parallel", "size"),
    [(ParallelConfig(data_replicate=3), 4), (ParallelConfig(data_shard=2), 1), (ParallelConfig(data_replicate=4), 2)],
)
def test_a_layout_for_another_number_of_processes(parallel: ParallelConfig, size: int) -> None:
    with pytest.raises(ValueError, match="every process has one place"):
        distributed.check_layout(parallel, size)
