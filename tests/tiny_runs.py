"""Runs of the recipes that take a fraction of a second: tiny models, ten short rows, and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import kdtune
from kdtune import checkpoint
from kdtune.cli.main import main
from kdtune.teacher_cache import TeacherCache

TEACHER_ASSETS = Path(kdtune.__file__).parent / "assets" / "quickstart" / "teacher"
NUM_ROWS = 10
ANSWERS = ("ids", "log_probs", "log_rest", "entropy", "label_log_probs", "top_ids", "weights", "hidden")
# Of a line in metrics.jsonl; everything else is a function of settings and seed.
MEASURED = ("tokens_per_second", "peak_memory_gib")


def write_model(folder: Path, seed: int, **config: Any) -> Path:
    """A Llama with two heads of 16 and random weights, of the quickstart's vocabulary and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **json.loads((TEACHER_ASSETS / "config.json").read_text()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "dtype": "float32",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = checkpoint.load_model(folder, dtype=torch.float32, device="cpu", random_weights=True, seed=seed)
    checkpoint.save_model(model, folder, config=config, companions=checkpoint.read_companions(TEACHER_ASSETS))
    return folder


def write_rows(path: Path, count: int = NUM_ROWS) -> Path:
    """Questions and answers of 14 to 42 tokens, no two alike."""
    rows = [
        {
            "prompt": f"Question: Tom has {7 * i + 3} apples"
            + " and buys one more" * (i % 3)
            + ". How many?\nAnswer: ",
            "completion": "He has" + " one more, so he has" * (3 * i % 4) + f" {7 * i + 3 + i % 3} apples.",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(tiny: Path, output_dir: Path, *overrides: str, recipe: str) -> list[str]:
    """Nine steps: three epochs of 4, 4 and 2 rows, in shuffled order, with warm-up and cosine."""
    settings = [
        f"checkpointer.checkpoint_dir={tiny / 'student'}",
        "tokenizer.max_seq_len=64",
        f"dataset.source={tiny / 'rows.jsonl'}",
        "dataset.format=completion",
        "batch_size=2",
        "gradient_accumulation_steps=2",
        "epochs=3",
        "optimizer.lr=0.01",
        "lr_scheduler.num_warmup_steps=4",
        "device=cpu",
        "dtype=fp32",
        f"output_dir={output_dir}",
    ]
    if recipe == "knowledge_distillation":
        settings.append(f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}")
    return ["run", recipe, *settings, *overrides]


def distil(tiny: Path, output_dir: Path, *overrides: str) -> Path:
    """Run `knowledge_distillation` as the launcher does; returns `output_dir`."""
    main(arguments(tiny, output_dir, *overrides, recipe="knowledge_distillation"))
    return output_dir


def finetune(tiny: Path, output_dir: Path, *overrides: str) -> Path:
    """Run `finetune` as the launcher does; returns `output_dir`."""
    main(arguments(tiny, output_dir, *overrides, recipe="finetune"))
    return output_dir


def cache(tiny: Path, folder: Path, *overrides: str) -> Path:
    """Run `cache_teacher_logits` as the launcher does; returns `folder`."""
    settings = [
        f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}",
        "tokenizer.max_seq_len=64",
        f"dataset.source={tiny / 'rows.jsonl'}",
        "dataset.format=completion",
        "batch_size=3",
        "device=cpu",
        "dtype=fp32",
        f"output_dir={folder}",
    ]
    main(["run", "cache_teacher_logits", *settings, *overrides])
    return folder


def distil_from_cache(tiny: Path, output_dir: Path, folder: Path, *overrides: str) -> Path:
    """Run `knowledge_distillation` on the answers in `folder`; returns `output_dir`."""
    argv = arguments(tiny, output_dir, *overrides, recipe="knowledge_distillation")
    argv.remove(f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}")
    main([*argv, f"teacher.cache_dir={folder}"])
    return output_dir


def assert_same_answers(one: Path, other: Path, rtol: float = 1e-5) -> None:
    """Of the same examples."""
    expected, found = TeacherCache(one), TeacherCache(other)
    assert found.ids.tolist() == expected.ids.tolist()
    for id in expected.ids.tolist():
        mine, theirs = expected.read(id), found.read(id)
        for name in ANSWERS:
            if hasattr(mine, name):
                np.testing.assert_allclose(getattr(theirs, name), getattr(mine, name), rtol, 1e-6, err_msg=name)


def validated_on(tiny: Path) -> list[str]:
    """Overrides that add a validation."""
    return [f"dataset_val.source={tiny / 'rows.jsonl'}", "dataset_val.split=[:3]", "dataset_val.format=completion"]


def lines(output_dir: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def steps(output_dir: Path) -> list[dict[str, Any]]:
    """The training lines of metrics.jsonl, without what is measured."""
    return [line for line in numbers(output_dir) if "loss" in line]


def numbers(output_dir: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl, without what is measured."""
    found = lines(output_dir)
    return [{key: value for key, value in line.items() if key.split("/")[0] not in MEASURED} for line in found]


def weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint."""
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    expected = weights(one)
    found = weights(other)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def learn_and_resume(pair: Path, tmp_path: Path, *settings: str) -> dict[str, Tensor]:
    """Distil with hidden states: their loss falls, and a run that is resumed half way ends the same bit for bit.

    Returns:
        The weights that were saved, or those of the adapter.
    """
    whole = distil(pair, tmp_path / "whole", *settings, "max_steps=4")
    expected_lines = steps(whole)
    assert expected_lines[-1]["hidden_loss"] < expected_lines[0]["hidden_loss"]
    run = distil(pair, tmp_path / "run", *settings, "max_steps=2", "save_every_n_steps=2")
    distil(pair, run, *settings, "max_steps=4", "resume_from_checkpoint=true")
    assert numbers(run) == expected_lines
    (found,), (expected,) = (
        [load_file(path) for path in folder.glob("[am]*/*.safetensors")] for folder in (run, whole)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    return expected


def assert_same_run(one: Path, other: Path) -> None:
    """The same numbers in the same order and the same model, bit for bit."""
    assert numbers(one) == numbers(other)
    assert_same_weights(one / "model", other / "model")
