"""Plans against real steps on the CPU: the tracker's peak, and the allocator's own record of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import real_steps
import torch
from real_steps import FINETUNE, KD, STUDENT, TEACHER

from kdtune import checkpoint, devices, planning
from kdtune.distributed import ALONE
from kdtune.models import from_hf_config, num_parameters
from kdtune.optim import adamw, moments
from kdtune.planning import Plan

CHECKPOINTING = "enable_activation_checkpointing=true"
WINDOWS = {"model_type": "mistral", "sliding_window": 40}
# Recipe, what differs in the student's config.json, overrides.
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "plain": (KD, {}, []),
    "bf16": (KD, {}, ["dtype=bf16"]),
    "untied bf16": (KD, {"tie_word_embeddings": False}, ["dtype=bf16", "loss_chunk_size=256"]),
    "checkpointing": (KD, {"num_hidden_layers": 8}, [CHECKPOINTING]),
    "checkpointing bf16": (KD, {"num_hidden_layers": 8}, [CHECKPOINTING, "dtype=bf16"]),
    "accumulation": (KD, {}, ["gradient_accumulation_steps=3", "dtype=bf16"]),
    "packed": (KD, {}, ["dataset.packed=true"]),
    "windows": (KD, WINDOWS, ["kd_loss.balance=true"]),
    "packed windows": (FINETUNE, WINDOWS, ["dataset.packed=true", "dtype=bf16"]),
    "padded vocabulary": (KD, {"vocab_size": 2112}, ["kd_loss.name=jsd", "kd_loss.initial_teacher_share=0.5"]),
    "norms of heads": (KD, {"model_type": "qwen3", "head_dim": 32}, ["kd_loss.temperature=2"]),
    "selective": (KD, {}, [CHECKPOINTING, "activation_checkpointing_mode=selective"]),
    "int8 teacher": (KD, {}, ["teacher.quantization=int8"]),
    "int8_dynamic teacher": (KD, {}, ["teacher.quantization=int8_dynamic"]),
    "int4 teacher": (KD, {}, ["teacher.quantization=int4", "dtype=bf16"]),
    "nf4 teacher": (KD, {}, ["teacher.quantization=nf4", "dtype=bf16"]),
    "fp8 teacher": (KD, {}, ["teacher.quantization=fp8"]),
    "bf16 teacher": (KD, {}, ["teacher.dtype=bf16"]),
    "bf16 rounded by chance": (KD, {}, ["optimizer.precision=stochastic", "dtype=bf16"]),
    "optimizer on 8 bits": (KD, {}, ["optimizer.name=adamw_8bit", "dtype=bf16"]),
    "optimizer on 4 bits": (KD, {}, ["optimizer.name=adamw_4bit", "dtype=bf16"]),
    "steps in the backward": (KD, {}, ["optimizer_in_bwd=true", "clip_grad_norm=null", "dtype=bf16"]),
    "finetune": (FINETUNE, {}, []),
    "finetune bf16": (FINETUNE, {"tie_word_embeddings": False}, ["dtype=bf16"]),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_steps.write_model(tmp_path_factory.mktemp("teacher"), TEACHER)


def case(name: str, teacher: Path, tmp_path: Path) -> tuple[str, Any]:
    recipe, differs, overrides = CASES[name]
    student = real_steps.write_config(tmp_path, STUDENT | differs)
    return recipe, real_steps.settings(recipe, student, teacher, *overrides)


# What the others have of their own is in one of these as well, or small.
QUICK = (
    *("untied bf16", "checkpointing bf16", "packed windows", "padded vocabulary"),
    *("selective", "nf4 teacher", "optimizer on 8 bits", "steps in the backward"),
)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_peak_is_that_of_a_real_step(name: str, teacher: Path, tmp_path: Path) -> None:
    recipe, cfg = case(name, teacher, tmp_path)
    planned, measured = real_steps.planned(recipe, cfg).device, real_steps.measured(recipe, cfg)
    assert planned.total == pytest.approx(measured.total, rel=0.01)
    assert sum(planned.parts.values()) == planned.total


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_peak_is_what_the_allocator_records(name: str, teacher: Path, tmp_path: Path) -> None:
    recipe, cfg = case(name, teacher, tmp_path)
    planned, recorded = real_steps.planned(recipe, cfg).device.total, real_steps.recorded(recipe, cfg)
    # Looking codes up, the CPU's kernel takes another block of its own, which is no tensor.
    lookup = 4 * adamw.BLOCK if cfg.optimizer.name in ("adamw_8bit", "adamw_4bit") else 0
    assert planned + lookup == pytest.approx(recorded, rel=0.01)


def test_parts(tmp_path: Path) -> None:
    """From the shapes alone: neither folder has weights."""
    student, teacher = (
        real_steps.write_config(tmp_path / name, config) for name, config in (("s", STUDENT), ("t", TEACHER))
    )
    cfg = real_steps.settings(KD, student, teacher, "dtype=bf16", "gradient_accumulation_steps=2")
    parts = real_steps.planned(KD, cfg).device.parts
    size, teacher_size = (
        2 * num_parameters(from_hf_config(checkpoint.read_config(folder))) for folder in (student, teacher)
    )
    assert parts["student weights"] == size
    assert parts["gradients"] == 2 * size, "they add up in float32"
    assert parts["optimizer"] == 5 * size, "moments in float32, and the other half of weights in float32"
    assert parts["teacher weights"] == teacher_size
    heads_gradient = STUDENT["vocab_size"] * STUDENT["hidden_size"]
    logits = 48 * (STUDENT["vocab_size"] + TEACHER["vocab_size"])
    assert 4 * (heads_gradient + logits) < parts["loss"] < 4 * (heads_gradient + 4 * logits)  # with temporaries


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_operations(device: str, packed: bool, checkpointing: bool, tmp_path: Path) -> None:
    student, teacher = (
        real_steps.write_config(tmp_path / name, config) for name, config in (("s", STUDENT), ("t", TEACHER))
    )
    overrides = [f"device={device}", f"enable_activation_checkpointing={checkpointing}", "dtype=bf16"]
    overrides.append(f"dataset.packed={packed}")
    cfg = real_steps.settings(KD, student, teacher, "gradient_accumulation_steps=4", *overrides)
    plan = real_steps.planned(KD, cfg)
    s, num_tokens = 128, 4 * 2 * 128
    assert plan.num_tokens == num_tokens

    def body(config: dict[str, Any]) -> tuple[int, float]:
        """Multiplications for a token: by weights, and in attention."""
        d, wide = config["hidden_size"], config["intermediate_size"]
        weights = config["num_hidden_layers"] * (3 * d * d + 3 * d * wide)  # half as many heads of keys and values
        return weights, config["num_hidden_layers"] * 2 * d * (s + 1) / 2

    weights, attention = body(STUDENT)
    forward = weights + attention
    # Two of each product for the gradients; attention makes its scores again. What a layer computes again ends before
    # its last product, whose inputs are all that is needed.
    last = STUDENT["num_hidden_layers"] * STUDENT["hidden_size"] * STUDENT["intermediate_size"]
    backward = 2 * weights + 2.5 * attention + checkpointing * (forward - last)
    heads = STUDENT["vocab_size"] * (3 * STUDENT["hidden_size"] + TEACHER["hidden_size"])
    expected = {"student": forward + backward, "teacher": sum(body(TEACHER)), "heads": heads}
    assert plan.flops == pytest.approx({part: 2 * num_tokens * count for part, count in expected.items()}, rel=0.01)
    assert plan.floor == 2 * num_tokens * (3 * weights + body(TEACHER)[0] + heads)


@pytest.mark.parametrize(
    ("settings", "formats"),
    [
        ("dtype=bf16", {"bf16": ("student", "teacher", "heads")}),
        ("dtype=fp32 matmul_precision=high", {"tf32": ("student", "teacher", "heads")}),
        ("dtype=fp32 teacher.dtype=bf16", {"bf16": ("teacher",), "fp32": ("student", "heads")}),
    ],
)
def test_floor_of_the_time(settings: str, formats: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    """Each product at the rate of its own number format."""
    folder = real_steps.write_config(tmp_path, STUDENT)
    plan = real_steps.planned(KD, real_steps.settings(KD, folder, folder, "device=cuda", *settings.split()))
    rates = {"bf16": 100.0, "tf32": 10.0, "fp32": 1.0}
    compute_bound = planning.Accelerator("", 80, 1e9, rates["bf16"], rates["tf32"], rates["fp32"], link=1)
    expected = sum(plan.flops[part] / (rates[name] * 1e12) for name, parts in formats.items() for part in parts)
    if "teacher.dtype=bf16" in settings:  # its head is multiplied by the loss, in its own format
        (d, v), tokens = (STUDENT["hidden_size"], STUDENT["vocab_size"]), plan.num_tokens
        expected += 2 * tokens * d * v * (1 / rates["bf16"] - 1 / rates["fp32"]) / 1e12
    assert planning.seconds(plan, compute_bound) == pytest.approx(expected)


def test_floor_of_the_time_with_an_adapter(tmp_path: Path) -> None:
    """The optimizer has nothing to do with frozen weights."""
    folder = real_steps.write_config(tmp_path, STUDENT)
    plan = real_steps.planned(FINETUNE, real_steps.settings(FINETUNE, folder, folder, "device=cuda", "lora.rank=1"))
    memory_bound = planning.Accelerator("", 80, 1e-9, 1e9, 1e9, 1e9, link=1)
    held = plan.device.parts
    trained = 2 * (2 * held["adapters"] + held["optimizer"]) + held.get("gradients", 0)
    assert planning.seconds(plan, memory_bound) == pytest.approx((2 * held["student weights"] + trained) / 1e3)


def test_a_step_after_a_plan_has_data(teacher: Path, tmp_path: Path) -> None:
    """What is made once and kept, as the tables of 8-bit moments are, is not the plan's."""
    moments.table.cache_clear()
    recipe, cfg = case("optimizer on 8 bits", teacher, tmp_path)
    real_steps.planned(recipe, cfg)
    built = real_steps.recipe(recipe).build(cfg, ALONE)
    real_steps.step(recipe, cfg, built)
    assert all(parameter.isfinite().all() for parameter in built[0].parameters())


def test_in_words(teacher: Path, tmp_path: Path, planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, cfg = case("finetune", teacher, tmp_path)
    recipe = real_steps.recipe(name)
    text = planning.describe(cfg, recipe.build, recipe.forward_backward, ALONE)
    assert re.fullmatch(r"about \d+ MiB \(student weights .*\) when every row has 128 tokens", text)

    monkeypatch.setattr(devices, "memory", lambda device: 2**20)
    warned = planning.describe(cfg, recipe.build, recipe.forward_backward, ALONE)
    assert warned.startswith(f"{text}\nWARNING: cpu has 1 MiB")

    monkeypatch.setattr(devices, "for_plan", lambda device: torch.device("meta"))
    monkeypatch.setattr(devices, "free_host_memory", lambda: 2**20)
    offloading = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, offload=True))
    warned = planning.describe(offloading, recipe.build, recipe.forward_backward, ALONE)
    assert re.search(r"\nWARNING: that is \d+ MiB of this machine's own memory, and 1 MiB are free\.$", warned)
    monkeypatch.undo()

    def with_a_loop_over_data(*_: Any) -> None:
        raise RuntimeError("no data")

    told = planning.describe(cfg, recipe.build, with_a_loop_over_data, ALONE)
    assert told == "not known, as this recipe's step cannot be run without data (RuntimeError: no data)"


def test_what_is_in_host_memory(tmp_path: Path) -> None:
    """Is counted there, and not on the GPU."""
    student, teacher = (
        real_steps.write_config(tmp_path / name, config) for name, config in (("s", STUDENT), ("t", TEACHER))
    )

    def planned(*overrides: str) -> Plan:
        return real_steps.planned(
            KD, real_steps.settings(KD, student, teacher, "device=cuda", "dtype=bf16", *overrides)
        )

    plain, size = planned(), 2 * num_parameters(from_hf_config(checkpoint.read_config(student)))
    assert plain.host.total < 100_000, "rows and tables"
    layers = 2 * TEACHER["num_hidden_layers"] * (3 * 256 * 256 + 3 * 256 * 384 + 2 * 256)

    teacher_offloaded = planned("teacher.offload=true")
    assert teacher_offloaded.host.parts["teacher weights"] == layers
    moved = plain.device.parts["teacher weights"] - teacher_offloaded.device.parts["teacher weights"]
    assert moved == layers

    offloaded = planned("optimizer.offload=true")
    assert "optimizer" not in offloaded.device.parts
    assert offloaded.host.parts["optimizer"] == plain.device.parts["optimizer"] == 5 * size
    assert offloaded.host.parts["temporary"] >= 2 * size, "weights and gradients are computed with there"

    kept = ["enable_activation_checkpointing=true", "enable_activation_offloading=true"]
    inputs = 2 * 2 * 128 * STUDENT["hidden_size"]  # of a layer; the last one's is needed again at once
    assert planned(*kept).host.parts["activations"] == (STUDENT["num_hidden_layers"] - 1) * inputs

    elsewhere = planned("teacher.device=cpu")
    assert elsewhere.host.parts["teacher weights"] == plain.device.parts["teacher weights"]
    head = 2 * 2048 * 256
    assert elsewhere.device.parts["teacher weights"] == head, "a copy beside the student's"
