"""The recipes in two processes: what they log and write is what one process logs and writes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny_runs
import torch
from safetensors.torch import load_file
from slow import marked, wanted
from steps import offload_without_a_gpu

from kdtune import distributed, preflight
from kdtune.cli.main import main
from kdtune.distributed import Ranks
from kdtune.evaluation import results

# Each process has a whole teacher, which may be quantised then; of the student it has a part.
WHOLE_TEACHER = ["teacher_parallel.data_replicate=2", "teacher_parallel.data_shard=1"]
TWO_AT_A_TIME = ["gradient_accumulation_steps=1"]
RUNS = {  # what is run, settings of two processes, and those of one as well
    "knowledge_distillation": (tiny_runs.distil, [*TWO_AT_A_TIME, *WHOLE_TEACHER], ["teacher.quantization=int8"]),
    "finetune": (tiny_runs.finetune, TWO_AT_A_TIME, []),
    "lora": (
        tiny_runs.finetune,
        TWO_AT_A_TIME,
        [
            "dtype=bf16",
            "optimizer.name=adamw",
            "lora.rank=4",
            "lora.use_dora=true",
            "lora.modules_to_save=[input_layernorm,k_proj]",
        ],
    ),
    "offloaded": (tiny_runs.distil, [*TWO_AT_A_TIME, "parallel.offload=true"], []),
    "tensor_parallel": (
        tiny_runs.distil,
        ["parallel.tensor=2"],
        ["checkpointer.checkpoint_dir={}/student", "teacher_checkpointer.checkpoint_dir={}/teacher"],
    ),
    "context_parallel": (tiny_runs.distil, ["parallel.context=2"], ["dataset.packed=true"]),
    "pipeline": (tiny_runs.distil, ["parallel.pipeline=2"], ["checkpointer.checkpoint_dir={}/teacher"]),
    "finetune_pipeline": (tiny_runs.finetune, ["parallel.pipeline=2"], ["checkpointer.checkpoint_dir={}/teacher"]),
}
SLOW = {"offloaded", "finetune_pipeline"}
GENERATING = ("tensor", "data_shard", "pipeline", "data_replicate")
PAIR = {"checkpointer": "student", "teacher_checkpointer": "teacher"}
TWO_HEADS = {"num_key_value_heads": 2}  # those of `tiny` have one, which cannot be split
HALVES = ["save_every_n_steps=4", "max_steps=6", "enable_activation_checkpointing=true", "optimizer.name=adamw_8bit"]


def work(tiny: Path, folder: Path, names: Sequence[str]) -> None:
    offload_without_a_gpu()
    preflight.check_offloading = lambda *_: None  # which would say that on the CPU all is there
    for name in names:
        recipe, of_two, of_both = RUNS[name]
        ranks.meet_at_another_port(folder / f"port_of_{name}")
        settings = [*HALVES, *(setting.format(folder) for setting in of_both), *of_two, *tiny_runs.validated_on(tiny)]
        recipe(tiny, folder / name, *settings, "max_steps=4", "sample_prompts=[How many]", "sample_max_new_tokens=3")
        ranks.meet_at_another_port(folder / f"next_port_of_{name}")
        recipe(tiny, folder / name, *settings, "resume_from_checkpoint=true")


def continuations(folder: Path, *settings: str) -> str:
    """What `generate` draws after four prompts."""
    out = folder / "out.jsonl"
    given = [f"checkpointer.checkpoint_dir={folder / 'teacher'}", f"prompts_file={folder / 'prompts.txt'}"]
    given += ["temperature=1", "max_new_tokens=6", "batch_size=3", "device=cpu", "dtype=fp32", f"output_file={out}"]
    main(["run", "generate", *given, *settings])
    return out.read_text() if os.environ.get("RANK", "0") == "0" else ""


def generate_in_two(folder: Path) -> list[str]:
    found = []
    for layout in GENERATING:
        ranks.meet_at_another_port(folder / f"port_of_generate_{layout}")
        found.append(continuations(folder, f"parallel.{layout}=2"))
    return found


def test_generate_in_two_processes(in_two: Path) -> None:
    first, _ = ranks.run(2, generate_in_two, in_two, in_two)
    assert first == [continuations(in_two)] * len(GENERATING)


def evaluate(folder: Path, rows: Path, *settings: str) -> dict[str, Any]:
    """What `evaluate` finds of one model beside another."""
    given = [f"{role}.checkpoint_dir={folder / name}" for role, name in PAIR.items()]
    given += [f"dataset.source={rows}", "dataset.format=completion", "tokenizer.max_seq_len=64", "batch_size=2"]
    given += [f"responses.dataset.source={rows}", "responses.dataset.format=completion"]
    given += ["responses.seeds=[0,1]", "responses.max_new_tokens=4"]
    given += ["sample_prompts=[Tom has]", "sample_max_new_tokens=4", "device=cpu", "dtype=fp32"]
    main(["run", "evaluate", *given, f"output_dir={folder / 'evaluation'}", "overwrite_output_dir=true", *settings])
    if os.environ.get("RANK", "0") != "0":
        return {}  # the first one writes
    found = results.read(folder / "evaluation")
    return {
        "metrics": [{name: (m.value, m.stderr) for name, m in one.metrics.items()} for one in found.results],
        "ids": [one.id for one in results.read_examples(folder / "evaluation")],
        "samples": [(one.student, one.teacher) for one in found.samples],
        "responses": [one.responses for one in results.read_responses(folder / "evaluation")],
        "tokens": [one.tokens for one in results.read_tokens(folder / "evaluation")],
    }


def evaluate_in_two(folder: Path, rows: Path) -> list[dict[str, Any]]:
    found = []
    for layout in GENERATING:
        ranks.meet_at_another_port(folder / f"port_of_evaluate_{layout}")
        found.append(evaluate(folder, rows, f"parallel.{layout}=2"))
    return found


def test_evaluate_in_two_processes(tiny: Path, tmp_path: Path) -> None:
    """Seven rows in batches of two, so that a process has none at the end."""
    for seed, name in enumerate(PAIR.values()):
        tiny_runs.write_model(tmp_path / name, seed=seed, **TWO_HEADS, initializer_range=0.1)
    rows = tmp_path / "seven.jsonl"
    rows.write_text("".join((tiny / "rows.jsonl").read_text().splitlines(keepends=True)[:7]))
    expected = evaluate(tmp_path, rows)
    first, _ = ranks.run(2, evaluate_in_two, tmp_path, tmp_path, rows)
    for found in first:
        for name in ("ids", "samples", "responses", "tokens"):
            assert found[name] == expected[name]
        for one, other in zip(found["metrics"], expected["metrics"], strict=True):
            for name, numbers in other.items():
                assert one[name] == pytest.approx(numbers, rel=2e-5, abs=1e-7), name


TASKS = {
    "choices": {"output_type": "multiple_choice", "doc_to_choice": ["{{completion}}", "No.", " 7"], "doc_to_target": 0},
    "texts": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{prompt}}{{completion}}", "doc_to_text": ""},
    "answers": {"output_type": "generate_until", "doc_to_target": "{{completion}}"},
}
METRICS = {"choices": "acc", "texts": "bits_per_byte", "answers": "exact_match"}


def answers(folder: Path, *settings: str) -> dict[str, Any]:
    """Of each task, what a model has answered, and the metrics."""
    given = [f"checkpointer.checkpoint_dir={folder / 'teacher'}", f"output_dir={folder / 'answers'}"]
    given += [f"tasks.include_path={folder / 'tasks'}", f"tasks.names=[{','.join(TASKS)}]", "tasks.max_tokens=100"]
    given += ["tasks.log_samples=true", "device=cpu", "dtype=fp32", "overwrite_output_dir=true"]
    main(["run", "evaluate", *given, *settings])
    if os.environ.get("RANK", "0") != "0":
        return {}
    found = {}
    for one in results.read(folder / "answers").results:
        lines = (folder / "answers" / "tasks" / f"{one.task}.jsonl").read_text().splitlines()
        said = [json.loads(line)["resps"] for line in lines]
        found[one.task] = (said, {name: metric.value for name, metric in one.metrics.items()}, one.num_tokens)
    return found


def answers_in_two(folder: Path) -> list[dict[str, Any]]:
    found = []
    for layout in GENERATING:
        ranks.meet_at_another_port(folder / f"port_of_answers_{layout}")
        found.append(answers(folder, f"parallel.{layout}=2"))
    return found


@pytest.mark.slow
def test_tasks_in_two_processes(in_two: Path, tiny: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kdtune[eval]'")
    (in_two / "tasks").mkdir()
    for name, task in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tiny / "rows.jsonl")}}}
        base = {"task": name, **files, "test_split": "test", "doc_to_text": "{{prompt}}"}
        more = {"metric_list": [{"metric": METRICS[name]}], "generation_kwargs": {"max_gen_toks": 5, "until": ["."]}}
        (in_two / "tasks" / f"{name}.yaml").write_text(json.dumps({**base, **more, **task}))
    expected = answers(in_two)
    first, _ = ranks.run(2, answers_in_two, in_two, in_two)
    for found in first:
        assert found["answers"] == expected["answers"]
        for name in ("choices", "texts"):
            (said, metrics, num_tokens), (expected_said, expected_metrics, count) = found[name], expected[name]
            np.testing.assert_allclose(np.array(said), np.array(expected_said), rtol=2e-5)
            assert metrics == pytest.approx(expected_metrics, rel=2e-5)
            assert num_tokens == count


@pytest.fixture(scope="module")
def in_two(tiny: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("in_two")
    tiny_runs.write_model(folder / "student", seed=1, **TWO_HEADS, num_hidden_layers=1)
    tiny_runs.write_model(folder / "teacher", seed=0, **TWO_HEADS, initializer_range=0.1)
    (folder / "prompts.txt").write_text("Tom has\nHow many\nQuestion: A baker\nHe\n")
    ranks.run(2, work, folder, tiny, folder, wanted(RUNS, SLOW, request))
    return folder


@pytest.mark.parametrize("name", marked(RUNS, SLOW))
def test_a_run_of_two_processes(name: str, tiny: Path, in_two: Path, tmp_path: Path) -> None:
    recipe, _, of_both = RUNS[name]
    settings = [setting.format(in_two) for setting in of_both]
    alone = recipe(tiny, tmp_path / "alone", *HALVES, *settings, *tiny_runs.validated_on(tiny))
    found, expected = (tiny_runs.numbers(run) for run in (in_two / name, alone))
    validated_on_stopping = [line for line in found if line["step"] == 4 and "loss" not in line]
    assert validated_on_stopping, "the run that ended after four steps"
    found = [line for line in found if line not in validated_on_stopping]
    of_ranks = [key for key in tiny_runs.lines(in_two / name)[-2] if key.startswith("peak_memory_gib/")]
    assert of_ranks == ["peak_memory_gib/rank_0", "peak_memory_gib/rank_1"]
    assert [sorted(line) for line in found] == [sorted(line) for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-3)
    weights, others = (
        {key: weight for path in run.glob("[am]*/*.safetensors") for key, weight in load_file(path).items()}
        for run in (in_two / name, alone)
    )
    assert weights.keys() == others.keys()
    for key, weight in others.items():
        # Moments of 8 bits are cut into other blocks.
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=5e-3)
    assert sorted(path.name for path in (in_two / name).iterdir()) == sorted(path.name for path in alone.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.data_replicate=3"], "parallel.data_replicate=3 is 3, and there are 2 processes"),
        (["parallel.tensor=2", "parallel.data_shard=2"], "parallel.data_shard=2 times parallel.tensor=2 is 4"),
        (["teacher_parallel.data_shard=4"], "teacher_parallel.data_shard=4"),
        (["teacher_parallel.reshard_after_forward=false"], "for its backward, and this model has none"),
        (["lora.rank=2", "parallel.tensor=2"], "lora does not go with parallel.tensor=2"),
        (["qat.weights=int8", "parallel.tensor=2"], "qat does not go with parallel.tensor=2"),
        (["optimizer_in_bwd=true", "parallel.pipeline=2"], "optimizer_in_bwd does not go with parallel.pipeline=2"),
        (["hidden_loss.name=mse", "parallel.pipeline=2"], "hidden_loss does not go with parallel.pipeline=2"),
        (["parallel.tensor=2"], "the student has 1 key heads"),
        (["parallel.tensor=2", "kd_loss.name=adaptive_kl"], "sorts whole distributions"),
        (["parallel.tensor=2", "teacher_parallel.data_shard=2"], "Give teacher_parallel.tensor=2"),
        (["parallel.context=2", "teacher_parallel.data_shard=2"], "Give teacher_parallel.context=2"),
        (
            ["parallel.context=2", "checkpointer.checkpoint_dir={}/three_heads"],
            "the student has 3 heads and 1 key heads",
        ),
        (["parallel.pipeline=2", "teacher_parallel.data_shard=2"], "Give teacher_parallel.pipeline=2"),
        (["parallel.pipeline=2"], "the student has 1. Take fewer stages"),
        (["parallel.context=2", "teacher.quantization=int8"], "Leave it out, or parallel.context"),
        (["teacher.quantization=int8"], "whole teacher: teacher_parallel.data_replicate=2"),
        (["parallel.offload=true"], "memory, and on the CPU it is there"),
        (["teacher_parallel.offload=true"], "teacher_parallel.offload=true keeps"),
    ],
)
def test_refusals(
    overrides: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = distributed.check_layout
    two = Ranks(torch.device("cpu"), size=2)
    monkeypatch.setattr(distributed, "join", lambda cfg, device: (layout(cfg, 2), two)[1])
    tiny_runs.write_model(tmp_path / "three_heads", seed=1, num_attention_heads=3)
    with pytest.raises(SystemExit):
        tiny_runs.distil(tiny, tmp_path / "run", *(override.format(tmp_path) for override in overrides))
    assert message in capsys.readouterr().err
