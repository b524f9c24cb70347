"""`kdtune plan`: the text, the record, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from .conftest import Run

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """A plan from a config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    settings = [f"{name}.checkpoint_dir={tmp_path / 'model'}" for name in ("checkpointer", "teacher_checkpointer")]
    return ["plan", "knowledge_distillation", *settings, "tokenizer.max_seq_len=64", "output_dir=unwritten"]


def test_text(argv: list[str], kdtune: Run) -> None:
    status, out, err = kdtune(*argv, "gradient_accumulation_steps=3")
    assert (status, err) == (0, "")
    assert re.search(r"^step      12 x 64 tokens in 3 micro-batches, bf16$", out, re.MULTILINE)
    assert re.search(r"^memory    \d+ MiB of the GPU, in the [\w' ]+:$", out, re.MULTILINE)
    assert re.search(r"^ +student weights +\d+ KiB$", out, re.MULTILINE)
    assert re.search(
        r"^work      0.\d+ TFLOP: teacher's body \d+%, student's body \d+%, heads \d+%; 1.\d\d times", out, re.M
    )
    assert "GPUs of 6 GB and more" in out
    assert re.search(r"^T4 +16 +yes +- +-$", out, re.MULTILINE)
    assert "-: its hardware does not multiply bf16." in out
    assert re.search(r"^H200 +141 +yes +\S+ +[\d,]+$", out, re.MULTILINE)


def test_of_one_model(argv: list[str], kdtune: Run) -> None:
    settings = [one for one in argv[2:] if not one.startswith("teacher")]
    _, out, _ = kdtune("plan", "finetune", *settings)
    assert "teacher" not in out
    assert " tokens in 1 micro-batch, bf16\n" in out


def test_a_teacher_on_another_gpu(argv: list[str], kdtune: Run) -> None:
    assert "as if cuda:1 were the student's GPU" in kdtune(*argv, "teacher.device=cuda:1")[1]


def test_a_missing_adapter(argv: list[str], tmp_path: Path, kdtune: Run) -> None:
    status, _, err = kdtune(*argv, f"teacher_checkpointer.adapter_dir={tmp_path}")
    assert status == 2
    assert "has no adapter_config.json" in err
    assert "A plan needs config.json alone" not in err


def test_of_the_cpu(argv: list[str], kdtune: Run) -> None:
    _, out, _ = kdtune(*argv, "device=cpu", "dtype=fp32")
    assert "of the CPU" in out
    assert "GPU" not in out


def test_record(argv: list[str], kdtune: Run) -> None:
    status, out, err = kdtune(*argv, "--json", "dtype=fp32", "matmul_precision=high")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    peak = plan["memory_bytes"]["device"]
    assert peak["total"] == sum(peak["parts"].values())
    assert plan["num_tokens"] == 4 * 64
    assert plan["flops_by_format"] == {"tf32": sum(plan["flops"].values())}
    (a100,) = [one for one in plan["accelerators"] if one["name"] == "A100 80 GB"]
    assert a100["seconds_per_step"] >= sum(plan["flops"].values()) / 156e12
    assert a100["fits"]


def test_a_model_without_config(argv: list[str], tmp_path: Path, kdtune: Run) -> None:
    (tmp_path / "model" / "config.json").unlink()
    status, out, err = kdtune(*argv)
    assert (status, out) == (2, "")
    assert "no config.json" in err
    assert "kdtune download <owner/model> --output-dir <folder> --allow-patterns config.json" in err


def test_a_recipe_without_steps(kdtune: Run) -> None:
    status, out, err = kdtune("plan", "generate", "--config", "tiny")
    assert (status, out) == (2, "")
    assert "generate trains nothing that could be planned" in err


def test_a_changed_copy_is_planned_as_it_is(argv: list[str], tmp_path: Path, kdtune: Run) -> None:
    """Here with an objective that holds all logits."""
    copy = tmp_path / "mine.py"
    assert kdtune("cp", "knowledge_distillation", str(copy))[0] == 0
    source = copy.read_text()
    chunked = "loss = objective(cfg, hidden, student.head, targets, batch, num_tokens, progress, distances)"
    assert chunked in source
    dense = (
        "scored = batch.labels != losses.IGNORE\n"
        "        logits = student.head(hidden[scored])\n"
        "        teacher_logits = targets.head(targets.hidden[scored]).log_softmax(-1)\n"
        "        log_q = logits.log_softmax(-1)\n"
        "        kd = torch.nn.functional.kl_div(log_q, teacher_logits, log_target=True, reduction='sum')\n"
        "        print('kd', kd.item())\n"
        "        loss = losses.Loss(kd, kd, kd, kd, kd, kd, kd, kd)"
    )
    copy.write_text(source.replace(chunked, dense))
    status, out, err = kdtune("plan", str(copy), *argv[2:], "--json")
    assert (status, err) == (0, "")
    parts = json.loads(out.partition("\n")[2])["memory_bytes"]["device"]["parts"]
    logits = 2 * 4 * 64 * 256
    assert 4 * logits <= parts["loss"] < 8 * logits, "both models', their logarithms, and what the KL makes of them"


BIG = CONFIG | {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}


@pytest.fixture
def big(argv: list[str], tmp_path: Path) -> list[str]:
    """A plan of 3.5 GiB."""
    (tmp_path / "model" / "config.json").write_text(json.dumps(BIG | {"num_attention_heads": 16}))
    return [*argv, "optimizer.precision=nearest"]


def test_a_budget_is_met_by_the_cheapest_changes(big: list[str], kdtune: Run) -> None:
    status, out, err = kdtune(*big, "--budget", "2.9 GB", "gradient_accumulation_steps=2")
    assert (status, err) == (0, "")
    after = out.partition("To fit 2.9 GB, the cheapest change first:\n")[2]
    assert "optimizer.name=adamw_8bit\n    moments in 8 bits\n" in after
    assert "batch_size" not in after.partition("run ")[2], "smaller pieces save little here, and are taken back"
    (run,) = re.findall(r"^run       (kdtune run .*)$", after, re.MULTILINE)
    assert run.endswith("optimizer.precision=nearest gradient_accumulation_steps=2 optimizer.name=adamw_8bit")

    plans = [
        json.loads(kdtune(*big, *shlex.split(run)[5:], "--json")[1])["memory_bytes"]["device"]["total"]
        for run in (run, "k k k k k gradient_accumulation_steps=2")
    ]
    assert plans[0] <= 0.9 * 2.9 * 2**30 < plans[1]


@pytest.mark.parametrize(
    ("budget", "precision"),
    [("2.9", "optimizer.precision=fp32"), ("2.4", "optimizer.precision=stochastic")],
)
def test_moments_in_few_bits_round_no_weights_unless_they_must(
    budget: str, precision: str, big: list[str], kdtune: Run
) -> None:
    _, out, _ = kdtune(*big[:-1], "--budget", budget)
    assert f"  optimizer.name=adamw_8bit {precision}\n" in out


@pytest.mark.slow
def test_a_budget_that_cannot_be_met(argv: list[str], kdtune: Run) -> None:
    status, out, err = kdtune(*argv, "--budget=0.0001", "--json")
    assert (status, err) == (0, "")
    record = json.loads(out)
    budget = record["budget"]
    assert not budget["fits"]
    assert budget["memory_bytes"]["device"]["total"] < record["memory_bytes"]["device"]["total"]
    assert all(change["settings"] and change["price"] for change in budget["changes"])


def test_a_budget_that_is_met(argv: list[str], kdtune: Run) -> None:
    assert kdtune(*argv, "--budget", "24GB")[1].endswith("It fits 24 GB as it is.\n")


@pytest.mark.parametrize("size", ["much", "0", "24MB", "-3"])
def test_no_budget(size: str, argv: list[str], kdtune: Run) -> None:
    status, _, err = kdtune(*argv, f"--budget={size}")
    assert status == 2
    assert f"--budget {size}: it is the memory of a GPU, such as 24GB." in err


def test_settings_that_a_run_refuses(argv: list[str], kdtune: Run) -> None:
    status, _, err = kdtune(*argv, "optimizer_in_bwd=true")
    assert status == 2
    assert "clip_grad_norm=1.0 shrinks the gradient by its norm" in err


def test_of_one_of_several_processes(argv: list[str], kdtune: Run) -> None:
    layout = ["--nproc-per-node", "4", "--nnodes=2"]
    settings = [*argv[1:], "parallel.data_replicate=2", "gradient_accumulation_steps=3"]
    status, out, err = kdtune("plan", *layout, *settings)
    assert (status, err) == (0, "")
    assert "processes 8: data_replicate 2, data_shard 4; of number 0, which holds most:\n" in out
    assert "\nstep      12 x 64 tokens in 3 micro-batches, bf16; 96 rows in all\n" in out
    assert re.search(r"^ +gathered weights +\d+ KiB$", out, re.MULTILINE)
    assert re.search(r"^sends     \S+ GB a step, and gets as much:$", out, re.MULTILINE)
    assert re.search(r"^ +all-gather of weights +\S+ GB  4 processes$", out, re.MULTILINE)
    assert re.search(r"^ +all-reduce of gradients +\S+ GB  2 processes on 2 nodes$", out, re.MULTILINE)
    assert re.search(r"^at least, on +GB +fits +s a step +tokens/s +s sending$", out, re.MULTILINE)

    record = json.loads(kdtune("plan", *layout, *settings, "--json")[1])
    assert record["layout"]["data_shard"] == 4
    assert record["num_data_ranks"] == 8
    assert {"kind": "all-reduce", "part": "gradients", "size": 2, "nodes": 2} in [
        {key: value for key, value in message.items() if key != "bytes"} for message in record["sent_bytes"]
    ]
    (h100,) = [one for one in record["accelerators"] if one["name"] == "H100 SXM"]
    assert 0 < h100["seconds_sending"] < 1

    _, out, _ = kdtune("plan", *layout, *settings, "--budget", "24GB")
    assert out.endswith("It fits 24 GB as it is.\n")


def test_a_budget_of_several_processes(big: list[str], kdtune: Run) -> None:
    _, out, _ = kdtune("plan", "--nproc-per-node=2", *big[1:], "--budget=2.4GB", "parallel.data_replicate=2")
    (run,) = re.findall(r"^run       (kdtune run .*)$", out, re.MULTILINE)
    assert run.startswith("kdtune run --nproc-per-node 2 knowledge_distillation ")
    assert run.endswith(" parallel.data_replicate=1 parallel.data_shard=null")


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["--nproc-per-node=gpu"], [], "invalid number value: 'gpu'"),
        (["--nnodes=2"], [], "say how many processes there are on a machine"),
        (["--nproc-per-node=4"], ["parallel.data_shard=3"], "parallel.data_shard=3 is 3, and there are 4"),
        ([], ["parallel.tensor=2"], "there is 1 process:"),
        (["--nproc-per-node=2"], ["parallel.tensor=2"], "the student has 1 key heads"),
        (["--nproc-per-node=2"], ["teacher.quantization=int8"], "weights of few bits are not cut"),
    ],
)
def test_processes_that_a_run_refuses(
    options: list[str], settings: list[str], message: str, argv: list[str], kdtune: Run
) -> None:
    status, out, err = kdtune("plan", *options, *argv[1:], *settings)
    assert (status, out) == (2, "")
    assert message in err
