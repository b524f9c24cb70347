"""Compiled layers that several processes hold together take the steps that they take uncompiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from steps import Training
from torch._dynamo.utils import counters

from kdtune import models
from kdtune.distributed import ParallelConfig

LAYOUTS = {
    "sharded": ParallelConfig(),
    "tensor": ParallelConfig(tensor=2),
}
LENGTHS = (5, 17)


def work(folder: Path) -> dict[str, Any]:
    """Losses and norms of each layout, compiled and not; and what broke a graph."""
    found: dict[str, Any] = {}
    for name, parallel in LAYOUTS.items():
        plain, compiled = Training(folder, parallel), Training(folder, parallel)
        models.compile_layers(compiled.student)
        models.compile_layers(compiled.teacher.model)
        counters.clear()
        steps = (1, 2)
        found[name] = [[training.step(step, LENGTHS) for step in steps] for training in (plain, compiled)]
        found[f"breaks of {name}"] = dict(counters["graph_break"])
        found[f"graphs of {name}"] = counters["stats"]["unique_graphs"]
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_steps_are_those_without_a_compiler(oracle: Callable[..., Any], tmp_path: Path) -> None:
    for role, (name, changes) in {
        "student": ("qwen3", {"tie_word_embeddings": True}),
        "teacher": ("llama", {"hidden_size": 128}),
    }.items():
        oracle(name, **changes).double().save_pretrained(tmp_path / role)
    for answer in ranks.run(2, work, tmp_path, tmp_path):
        for name in LAYOUTS:
            plain, compiled = answer[name]
            torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=0, msg=name)
            assert not answer[f"breaks of {name}"], name
            assert answer[f"graphs of {name}"], "layers were compiled"
