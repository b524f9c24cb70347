"""Small models, their plans, and real steps to hold the plans against."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import most_allocated
from torch import Tensor, nn

from kdtune import checkpoint, config, data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.data.batch import ALL
from kdtune.distributed import ALONE
from kdtune.documents import Documents
from kdtune.optim import moments
from kdtune.planning import Peak, Plan, Tracker, plan
from kdtune.planning.tracker import plain_tensors

KD, FINETUNE = "knowledge_distillation", "finetune"
STUDENT = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
# Of sizes that every kind of quantisation takes.
TEACHER = STUDENT | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, hf_config: dict[str, Any]) -> Path:
    """A folder without weights, whole at any moment: several processes may write the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"config.{os.getpid()}.tmp"
    aside.write_text(json.dumps(hf_config))
    aside.rename(folder / "config.json")
    return folder


def write_model(folder: Path, hf_config: dict[str, Any]) -> Path:
    """A folder with random weights."""
    write_config(folder, hf_config)
    model = checkpoint.load_model(folder, dtype=torch.float32, device="cpu", random_weights=True)
    checkpoint.save_model(model, folder, config=hf_config)
    return folder


def recipe(name: str) -> ModuleType:
    return load_module(catalog.find_recipe(name))


def settings(name: str, student: Path, teacher: Path, *overrides: str) -> Any:
    """Those of a run; without rows, which a plan does not read."""
    common = [
        f"checkpointer.checkpoint_dir={student}",
        "checkpointer.random_weights=true",
        "tokenizer.max_seq_len=128",
        "batch_size=2",
        "loss_chunk_size=48",
        "output_dir=unwritten",
        "device=cpu",
        "dtype=fp32",
    ]
    if name == KD:
        common.append(f"teacher_checkpointer.checkpoint_dir={teacher}")
    return config.load(recipe(name).Config, None, [*common, *overrides])


def planned(name: str, cfg: Any) -> Plan:
    return plan(cfg, recipe(name).build, recipe(name).forward_backward)


def step(name: str, cfg: Any, built: tuple[Any, ...], share: data.Share = ALL) -> None:
    """An optimizer step on random rows of the full length with a label everywhere."""
    *models, optimizer = built
    shape = cfg.batch_size, cfg.tokenizer.max_seq_len
    rows = []
    for _ in range(cfg.gradient_accumulation_steps):
        tokens, labels = (torch.randint(STUDENT["vocab_size"], shape) for _ in range(2))
        documents = Documents.in_rows([[shape[1]]] * shape[0]) if cfg.dataset.packed else None
        rows.append(data.Batch(tokens, labels, torch.arange(shape[1]).expand(shape), documents))
    recipe(name).forward_backward(cfg, *models, [share.of(some) for some in rows], data.count_labels(rows))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(name: str, cfg: Any) -> Peak:
    """Of a real second step on the CPU, by the tracker that a plan is made with."""
    tracker = Tracker()
    moments.table.cache_clear()
    with tracker:
        built = recipe(name).build(cfg, ALONE)
        step(name, cfg, built)
        tracker.restart()
        step(name, cfg, built)
    return tracker.peaks[torch.device("cpu")]


def recorded(name: str, cfg: Any) -> int:
    """The same by the allocator's own record: what lives before the second step, and the most that it adds."""
    built = recipe(name).build(cfg, ALONE)
    step(name, cfg, built)
    *models, optimizer = built
    modules = [model if isinstance(model, nn.Module) else model.model for model in models]
    tensors = [part for module in modules for parameter in module.parameters() for part in plain_tensors(parameter)]
    tensors += [kept for state in optimizer.state.values() for kept in state.values() if isinstance(kept, Tensor)]
    if bits := {"adamw_8bit": 8, "adamw_4bit": 4}.get(cfg.optimizer.name):
        tensors += [part for signed in (True, False) for part in moments.table(bits, signed, torch.device("cpu"))]
    before = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(before.values()) + most_allocated(lambda: step(name, cfg, built))
