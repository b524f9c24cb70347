"""A run holds after fifty steps what it held after five."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import tiny_runs
import torch
from watching import LiveBytes

from kdtune import data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.distributed import Ranks

EVERYTHING = ["enable_activation_checkpointing=true", "dataset.packed=true"]
HIDDEN = [
    "hidden_loss.pairs=[{student: model.layers.0, teacher: model.layers.1},{student: model.norm, teacher: model.norm},"
    "{student: model.layers.0.self_attn.keys, teacher: model.layers.1.self_attn.keys, loss: relation}]",
    "hidden_loss.projection=per_pair",
]
SELECTIVE = [*EVERYTHING, "activation_checkpointing_mode=selective"]


@pytest.mark.parametrize(
    "overrides",
    [[], EVERYTHING, SELECTIVE, HIDDEN, [*HIDDEN, *EVERYTHING]],
    ids=["plain", "everything", "selective", "hidden", "hidden and everything"],
)
def test_memory_does_not_grow(overrides: list[str], tiny: Path, tmp_path: Path) -> None:
    """Neither what is kept between steps, nor the most that is alive within one; without the garbage collector."""
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    argv = tiny_runs.arguments(tiny, tmp_path, *overrides, recipe="knowledge_distillation")
    cfg = load(recipe.Config, None, argv[2:])
    device = torch.device("cpu")
    student, teacher, optimizer = recipe.build(cfg, Ranks(device))
    loader = recipe.load_data(cfg, recipe.load_tokenizer(cfg)).loader
    steps = [loader.next_step() for _ in range(3)]  # an epoch, of which steps 5 and 50 take the last
    after: dict[int, tuple[int, int | None]] = {}
    gc.collect()
    gc.disable()
    try:
        with LiveBytes(student, teacher.model) as live:
            for step in range(1, 51):
                micro_batches = steps[step % 3]
                live.peak = 0 if step in (5, 50) else None
                recipe.forward_backward(
                    cfg, student, teacher, micro_batches, data.count_labels(micro_batches), step / 50
                )
                optimizer.clip_grad_norm(cfg.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                after[step] = live.now(), live.peak
    finally:
        gc.enable()
    held, peak = after[5]
    assert 0 < held < peak
    assert after[50] == after[5]
