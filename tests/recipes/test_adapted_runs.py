"""Adapters in the recipes: what is trained, written, read again and resumed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import distil, finetune

from kdtune import checkpoint
from kdtune.cli.main import main

Recipe = Callable[..., Path]
LORA = ["lora.rank=4", "lora.alpha=16"]
CONSTANT = ["lr_scheduler.name=constant", "lr_scheduler.num_warmup_steps=0"]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(params=[distil, finetune], ids=lambda recipe: recipe.__name__)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained an adapter of the teacher, and wrote the merged model as well."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    start = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "optimizer.lr=0.02", *tiny_runs.validated_on(tiny)]
    return finetune(tiny, folder, *start, *LORA, "lora.save_merged=true")


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], Any]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call()
    return capsys.readouterr().err


def same_adapter(one: Path, other: Path) -> bool:
    found, expected = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, other))
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_run_leaves_behind(recipe: Recipe, tiny: Path, tmp_path: Path, capsys: Any) -> None:
    run = recipe(tiny, tmp_path / "run", *LORA, *tiny_runs.validated_on(tiny), "save_every_n_steps=4")
    out = capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "recipe.py", "versions.json", "metrics.jsonl", "checkpoints", "adapter")
    }
    assert {path.name for path in (run / "adapter").iterdir()} == ADAPTER
    assert {path.name for path in (run / "checkpoints/step_00000009").iterdir()} == {*ADAPTER, "training_state.pt"}
    assert "lora      1,856 parameters are trained, 2.5% of the model's: rank 4 beside 7 of its weights" in out
    before, *_, after = tiny_runs.numbers(run)
    key = "val_loss" if recipe is finetune else "val_ce_loss"
    assert after[key] < before[key]

    (line,) = [line for line in out.splitlines() if line.startswith("  kdtune run generate ")]
    main([*shlex.split(line)[1:], "max_new_tokens=2"])
    assert "tokens/s" in capsys.readouterr().out


def test_merged_is_what_the_adapter_makes(tiny: Path, tuned: Path) -> None:
    assert {path.name for path in tuned.iterdir()} >= {"adapter", "model"}
    adapted = checkpoint.load_model(
        tiny / "teacher", dtype=torch.float32, device="cpu", adapter_dir=tuned / "adapter"
    ).state_dict()
    changed = 0
    for name, weight in tiny_runs.weights(tuned / "model").items():
        torch.testing.assert_close(adapted[name], weight, atol=1e-7, rtol=0)
        changed += not torch.equal(weight, tiny_runs.weights(tiny / "teacher")[name])
    assert changed == 14, "seven in each layer"


def test_a_teacher_with_an_adapter(tiny: Path, tuned: Path, tmp_path: Path) -> None:
    merged = distil(tiny, tmp_path / "merged", f"teacher_checkpointer.checkpoint_dir={tuned / 'model'}")
    adapter = distil(tiny, tmp_path / "adapter", f"teacher_checkpointer.adapter_dir={tuned / 'adapter'}")
    assert tiny_runs.steps(adapter) == tiny_runs.steps(merged)
    assert tiny_runs.steps(adapter) != tiny_runs.steps(distil(tiny, tmp_path / "without"))


def test_training_goes_on_from_an_adapter(tiny: Path, tuned: Path, tmp_path: Path) -> None:
    """From its folder, or merged into the weights: where the first run ended, the next begins."""
    base = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", *tiny_runs.validated_on(tiny)]
    end = tiny_runs.numbers(tuned)[-1]["val_loss"]
    for start in (
        [*LORA, f"lora.start_from={tuned / 'adapter'}"],
        [f"checkpointer.adapter_dir={tuned / 'adapter'}"],
        [*LORA, f"checkpointer.adapter_dir={tuned / 'adapter'}", "lora.save_merged=true"],
    ):
        run = finetune(tiny, tmp_path / str(len(start)), *base, *start, "max_steps=2")
        assert tiny_runs.numbers(run)[0]["val_loss"] == pytest.approx(end, abs=1e-5)
        assert (run / "adapter").exists() == any("start_from" in setting for setting in start)
        assert (run / "model").exists() != (run / "adapter").exists()


HARD = [
    *("lora.dropout=0.3", "lora.use_dora=true", "lora.modules_to_save=[embed_tokens]", "dtype=bf16"),
    "enable_activation_checkpointing=true",
]


def test_resumed_equals_uninterrupted(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    settings = [*LORA, *HARD, *CONSTANT, "save_every_n_steps=4"]
    whole = recipe(tiny, tmp_path / "whole", *settings)
    parts = recipe(tiny, tmp_path / "parts", *settings, "max_steps=4")
    torch.rand(7)  # what happened in between is no matter
    recipe(tiny, parts, *settings, "resume_from_checkpoint=true")
    assert tiny_runs.numbers(parts) == tiny_runs.numbers(whole)
    assert same_adapter(parts, whole)
    moments = [torch.load(run / "checkpoints/step_00000009/training_state.pt") for run in (parts, whole)]
    assert len(moments[0]["optimizer"]["state"]) == 3 * 7 + 1
    for one, other in zip(*(state["optimizer"]["state"].values() for state in moments), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other if isinstance(other[key], torch.Tensor))


def test_without_the_teacher_it_is_fine_tuning(tiny: Path, tmp_path: Path) -> None:
    settings = [*LORA, "lora.dropout=0.2"]
    alone, with_teacher = (
        finetune(tiny, tmp_path / "a", *settings),
        distil(tiny, tmp_path / "b", *settings, "kd_ratio=0"),
    )
    assert [line["loss"] for line in tiny_runs.steps(alone)] == [line["loss"] for line in tiny_runs.steps(with_teacher)]
    assert same_adapter(alone, with_teacher)


def test_steps_in_the_backward_are_the_same_steps(tiny: Path, tmp_path: Path) -> None:
    """Also of an adapter that embedding and head share."""
    tied = tiny_runs.write_model(tmp_path / "tied", seed=1, num_hidden_layers=1, tie_word_embeddings=True)
    settings = [f"checkpointer.checkpoint_dir={tied}", *LORA, "lora.target_modules=[all-linear,lm_head]"]
    settings += ["gradient_accumulation_steps=1", "clip_grad_norm=null"]
    after, within = (finetune(tiny, tmp_path / x, *settings, f"optimizer_in_bwd={x}") for x in ("false", "true"))
    assert same_adapter(after, within)


def test_watching_changes_nothing(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    """Also where dropout draws random numbers in training: a validation has none and draws none."""
    settings = [*LORA, "lora.dropout=0.5"]
    plain = recipe(tiny, tmp_path / "plain", *settings)
    watching = ["run_val_every_n_steps=1", "save_every_n_steps=2", "sample_prompts=[Tom]", "sample_max_new_tokens=2"]
    watched = recipe(tiny, tmp_path / "watched", *settings, *tiny_runs.validated_on(tiny), *watching)
    assert tiny_runs.steps(watched) == tiny_runs.steps(plain)
    assert same_adapter(watched, plain)
    other_seed = recipe(tiny, tmp_path / "seed", *settings, "seed=1", "shuffle=false", "max_steps=1")
    same_seed = recipe(tiny, tmp_path / "same", *settings, "shuffle=false", "max_steps=1")
    assert tiny_runs.steps(other_seed) != tiny_runs.steps(same_seed), "dropout depends on the seed"


def test_some_layers_are_written_whole(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    start = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "checkpointer.keep_layers=[1]", "max_steps=2", *LORA]
    message = refused(capsys, lambda: distil(tiny, tmp_path / "run", *start))
    assert "lora.save_merged=true" in message
    run = distil(tiny, tmp_path / "run", *start, "lora.save_merged=true", "save_dtype=bf16")
    assert not (run / "adapter").exists()
    weights = tiny_runs.weights(run / "model")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "model.layers.0.self_attn.q_proj.weight" in weights
    assert f"checkpointer.checkpoint_dir={run / 'model'} device=cpu" in capsys.readouterr().out


def test_beside_a_base_in_few_bits(tiny: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 1, "head_dim": 128}
    wide = tiny_runs.write_model(tmp_path / "wide", seed=0, **sizes)
    settings = [f"checkpointer.checkpoint_dir={wide}", *LORA, "lora.base_quantization=nf4", "save_every_n_steps=3"]
    run = finetune(tiny, tmp_path / "run", *settings, "max_steps=3", *CONSTANT)
    finetune(tiny, run, *settings, *CONSTANT, "max_steps=6", "resume_from_checkpoint=true")
    whole = finetune(tiny, tmp_path / "whole", *settings, *CONSTANT, "max_steps=6")
    assert tiny_runs.steps(run) == tiny_runs.steps(whole)
    assert same_adapter(run, whole)
    plain = finetune(tiny, tmp_path / "plain", f"checkpointer.checkpoint_dir={wide}", *LORA, "max_steps=1", *CONSTANT)
    assert 0 < abs(tiny_runs.steps(plain)[0]["loss"] - tiny_runs.steps(run)[0]["loss"]) < 0.1


def test_refused(recipe: Recipe, tiny: Path, tuned: Path, tmp_path: Path, capsys: Any) -> None:
    def said(*settings: str, folder: str = "run") -> str:
        return refused(capsys, lambda: recipe(tiny, tmp_path / folder, *settings))

    assert "save_dtype=bf16 is about a whole model" in said(*LORA, "save_dtype=bf16")
    assert "makes them random" in said(*LORA, "checkpointer.random_weights=true")
    assert "Did you mean q_proj?" in said(*LORA, "lora.target_modules=[q_pro]")
    assert "lora.base_quantization=nf4 takes weights with" in said(*LORA, "lora.base_quantization=nf4")
    assert "is the adapter of another model" in said(f"checkpointer.adapter_dir={tuned / 'adapter'}")
    assert "int8_dynamic rounds the activations, through" in said(*LORA, "lora.base_quantization=int8_dynamic")
    assert "here float32 is trained" in said(*LORA, "dtype=bf16", "optimizer.precision=stochastic")
    assert not (tmp_path / "run").exists()

    recipe(tiny, tmp_path / "run", *LORA, "max_steps=1")
    message = said(*LORA, "resume_from_checkpoint=true")
    assert f"start a new run with lora.start_from={tmp_path / 'run/adapter'} and another output_dir" in message
    message = said(*LORA, f"lora.start_from={tmp_path / 'run/adapter'}", "overwrite_output_dir=true")
    assert "is part of the run in output_dir" in message
    recipe(tiny, tmp_path / "saved", *LORA, "max_steps=1", "save_every_n_steps=1")
    more = ["resume_from_checkpoint=true", "max_steps=2"]
    assert "holds an adapter, since the run began with lora" in said(*more, folder="saved")
    assert "lora.rank=8, but the adapter in" in said(*LORA, *more, "lora.rank=8", folder="saved")


def test_generate_reads_an_adapter(tiny: Path, tuned: Path, tmp_path: Path, capsys: Any) -> None:
    texts = []
    base, adapter = f"checkpointer.checkpoint_dir={tiny / 'teacher'}", f"checkpointer.adapter_dir={tuned / 'adapter'}"
    model = f"checkpointer.checkpoint_dir={tuned / 'model'}"
    for name, source in (("adapter", [base, adapter]), ("model", [model]), ("base", [base])):
        out = tmp_path / f"{name}.jsonl"
        settings = ["device=cpu", "dtype=fp32", "max_new_tokens=8", "prompt=Question: Tom has", f"output_file={out}"]
        main(["run", "generate", *source, *settings])
        texts.append(json.loads(out.read_text())["continuation"])
    assert texts[0] == texts[1] != texts[2]
