"""Between two logged steps the host never waits for the device: it asks for no value and for no copy to be over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from watching import Waits

from kdtune import data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.distributed import Ranks

RECIPES = ["knowledge_distillation", "finetune"]
SETTINGS = {
    "plain": [],
    "packed": ["dataset.packed=true"],
    "checkpointed": ["enable_activation_checkpointing=true", "activation_checkpointing_mode=selective"],
    "bf16": ["dtype=bf16"],
    "adapters": ["lora.rank=2", "lora.dropout=0.1"],
    "8-bit moments": ["optimizer.name=adamw_8bit"],
}
HIDDEN = [
    "hidden_loss.pairs=[{student: model.layers.0, teacher: model.layers.1},{student: model.norm, teacher: model.norm},"
    "{student: model.layers.0.self_attn.keys, teacher: model.layers.1.self_attn.keys, loss: relation}]",
    "hidden_loss.tokens=all",
    "hidden_loss.projection=shared",
    "hidden_loss.balance=true",
]
OBJECTIVE = [
    *HIDDEN,
    "kd_loss.name=jsd",
    "kd_loss.temperature=2",
    "kd_loss.label_margin=0.1",
    "kd_loss.balance=true",
    "kd_loss.initial_teacher_share=0.5",
    "ce_loss.label_smoothing=0.1",
    "ce_loss.z_loss=0.001",
]


def steps(name: str, tiny: Path, overrides: list[str], device: str) -> list[str]:
    """What the second and third step of a recipe wait for; the first one brings the frequencies of rope over."""
    recipe = load_module(catalog.find_recipe(name))
    cfg = load(recipe.Config, None, tiny_runs.arguments(tiny, tiny, *overrides, recipe=name)[2:])
    *models, optimizer = recipe.build(cfg, Ranks(torch.device(device)))
    loader = recipe.load_data(cfg, recipe.load_tokenizer(cfg)).loader
    waits = Waits(device)
    for step in range(3):
        micro_batches = loader.next_step()
        num_tokens = data.count_labels(micro_batches)
        progress: tuple[Any, ...] = (0.5,) if name == "knowledge_distillation" else ()
        if device == "cpu":  # where it cannot be told from the device
            micro_batches = [batch.to("cpu") for batch in micro_batches]
        with waits:
            recipe.forward_backward(cfg, *models, micro_batches, num_tokens, *progress)
            optimizer.clip_grad_norm(cfg.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step == 0:
            waits.found.clear()
    return waits.found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_waits_for_nothing(name: str, settings: str, device: str, tiny: Path) -> None:
    """On the CPU no value is read. On `meta`, where none could be, no copy from the host is waited for.

    (AdamW takes no step on `meta`.)
    """
    assert steps(name, tiny, SETTINGS[settings], device) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nor_does_any_part_of_the_objective(device: str, tiny: Path) -> None:
    assert steps("knowledge_distillation", tiny, OBJECTIVE, device) == []


@pytest.mark.parametrize("inference", [False, True])
def test_what_would_wait_is_seen(inference: bool) -> None:
    x = torch.arange(3.0)
    with Waits("cpu") as waits, torch.inference_mode(inference):
        x.sum().item()
        x[x > 1]
        x.repeat_interleave(torch.tensor([1, 0, 2]))
        x.to("meta")
        torch.empty(3, device="meta").copy_(x)
        torch.tensor([1.0], device="meta")
        x.to("meta", non_blocking=True)
    assert waits.found == [
        "aten::item" if inference else "aten::_local_scalar_dense",
        "aten::index.Tensor",
        "aten::repeat_interleave.self_Tensor" if inference else "aten::repeat_interleave.Tensor",
        "aten::to.dtype_layout" if inference else "aten::_to_copy",
        "aten::copy_",
        "torch.tensor",
    ]
