"""`knowledge_distillation` with hidden states: what is trained, logged, written, resumed and refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import distil

from kdtune.cli.main import main

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
RANGES = "hidden_loss.pairs=[{student: 'model.layers.{0..1}', teacher: 'model.layers.{0..2..2}'}]"
NORM = "hidden_loss.pairs=[{student: model.norm, teacher: model.norm}]"
CONSTANT = ["lr_scheduler.name=constant", "lr_scheduler.num_warmup_steps=0"]  # whatever the last step
BOTH = (
    "hidden_loss.pairs=[{student: model.layers.0.mlp, teacher: model.layers.1, loss: normalized_mse},"
    "{student: model.norm, teacher: model.norm}]"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two layers of 32 and a teacher of three of 48."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_runs.write_model(folder / "student", seed=1)
    tiny_runs.write_model(folder / "teacher", seed=0, hidden_size=48, num_hidden_layers=3, initializer_range=0.1)
    tiny_runs.write_rows(folder / "rows.jsonl")
    return folder


def cache(pair: Path, folder: Path, *settings: str) -> Path:
    """What the teacher says about the rows."""
    given = [f"dataset.source={pair / 'rows.jsonl'}", "dataset.format=completion", "tokenizer.max_seq_len=64"]
    given += [f"teacher_checkpointer.checkpoint_dir={pair / 'teacher'}", "device=cpu", "dtype=fp32"]
    main(["run", "cache_teacher_logits", *given, f"output_dir={folder}", *settings])
    return folder


def test_what_is_logged(pair: Path, tmp_path: Path) -> None:
    """Raw terms, of which the loss is made by the settings; and the student comes nearer to the teacher."""
    settings = ["kd_ratio=0.75", "kd_loss.weight=0.5", "hidden_loss.weight=3", "hidden_loss.projection=per_pair"]
    lines = tiny_runs.steps(distil(pair, tmp_path, RANGES, *settings, "max_steps=6"))
    for line in lines:
        each = [line[f"hidden_loss/model.layers.{i}"] for i in (0, 1)]
        assert line["hidden_loss"] == pytest.approx(sum(each) / 2, rel=1e-6)
        expected = 0.25 * line["ce_loss"] + 0.75 * (0.5 * line["kd_loss"] + 3 * line["hidden_loss"])
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert "hidden_factor" not in line
    assert lines[-1]["hidden_loss"] < 0.6 * lines[0]["hidden_loss"]


def test_balance(pair: Path, tmp_path: Path) -> None:
    """Each term as large as the cross-entropy; of several micro-batches each has its own factors."""
    settings = ["kd_loss.balance=true", "hidden_loss.balance=true", "hidden_loss.projection=shared"]
    whole = ["batch_size=4", "gradient_accumulation_steps=1", "max_steps=2"]
    for line in tiny_runs.steps(distil(pair, tmp_path, BOTH, *settings, *whole)):
        assert line["kd_factor"] * line["kd_loss"] == pytest.approx(line["ce_loss"], rel=1e-5)
        assert line["hidden_factor"] * line["hidden_loss"] == pytest.approx(line["ce_loss"], rel=1e-5)
        assert line["loss"] == pytest.approx(1.5 * line["ce_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        ["batch_size=4", "gradient_accumulation_steps=1"],
        ["batch_size=1", "gradient_accumulation_steps=4"],
        ["enable_activation_checkpointing=true"],
        ["enable_activation_checkpointing=true", "activation_checkpointing_mode=selective"],
        ["loss_chunk_size=7"],
        pytest.param(
            ["compile=true", "enable_activation_checkpointing=true"], marks=[pytest.mark.slow, needs_compiler]
        ),
    ],
    ids=" ".join,
)
def test_a_step_means_the_same(changes: list[str], pair: Path, tmp_path: Path) -> None:
    settings = [BOTH, "hidden_loss.projection=shared", "max_steps=4"]
    one, other = distil(pair, tmp_path / "one", *settings), distil(pair, tmp_path / "other", *settings, *changes)
    for line, expected in zip(tiny_runs.steps(other), tiny_runs.steps(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def test_all_tokens(pair: Path, tmp_path: Path) -> None:
    """However they are split and packed; a mean of other tokens than those with a label."""
    settings = [BOTH, "hidden_loss.projection=shared", "max_steps=1", "shuffle=false", "hidden_loss.tokens=all"]
    settings += ["gradient_accumulation_steps=1", "dataset.train_on_input=false"]
    splits = (
        ["batch_size=10"],
        ["batch_size=2", "gradient_accumulation_steps=5"],
        ["batch_size=10", "dataset.packed=true"],
    )
    runs = [distil(pair, tmp_path / str(i), *settings, *split) for i, split in enumerate(splits)]
    (expected,), *others = map(tiny_runs.steps, runs)
    for (line,) in others:
        assert line == pytest.approx(expected, rel=1e-4)
    (labelled,) = tiny_runs.steps(
        distil(pair, tmp_path / "labelled", *settings, "hidden_loss.tokens=labelled", *splits[0])
    )
    assert labelled["kd_loss"] == expected["kd_loss"]
    assert abs(labelled["hidden_loss"] / expected["hidden_loss"] - 1) > 1e-3


def test_packed_rows(pair: Path, tmp_path: Path) -> None:
    """The first step of all rows is that of the same rows in rows of their own."""
    settings = [BOTH, "hidden_loss.projection=shared", "max_steps=1", "shuffle=false", "gradient_accumulation_steps=1"]
    whole = distil(pair, tmp_path / "whole", *settings, "batch_size=10")
    packed = distil(pair, tmp_path / "packed", *settings, "batch_size=10", "dataset.packed=true")
    (line,), (expected,) = tiny_runs.steps(packed), tiny_runs.steps(whole)
    assert line["num_tokens"] == expected["num_tokens"]
    assert line == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ["lora.rank=2", "lora.dropout=0.1"],
        ["teacher.quantization=int8"],
        ["dtype=bf16", "optimizer.precision=stochastic", "optimizer_in_bwd=true", "clip_grad_norm=null"],
        ["teacher.dtype=bf16", "optimizer.name=adamw_8bit"],
        ["qat.group_size=16"],
    ],
    ids=" ".join,
)
def test_it_goes_with(settings: list[str], pair: Path, tmp_path: Path) -> None:
    """What changes how either model computes: it learns, and resumes bit for bit."""
    settings = [BOTH, "hidden_loss.projection=shared", *CONSTANT, *settings, "gradient_accumulation_steps=1"]
    expected = tiny_runs.learn_and_resume(pair, tmp_path, *settings)
    assert not [name for name in expected if "projection" in name or "beside" in name]


SAME = "model.layers.{0..1}.self_attn.values"
VALUES = f"{{student: '{SAME}', teacher: '{SAME}', loss: relation}}"
QUERIES = "{student: model.layers.1.self_attn.queries, teacher: model.layers.1.self_attn.queries, loss: relation}"
RELATIONS = f"hidden_loss.pairs=[{VALUES},{QUERIES}]"


@pytest.mark.parametrize(
    "settings", [[], ["enable_activation_checkpointing=true", "hidden_loss.relation_heads=4"]], ids=" ".join
)
def test_relations(settings: list[str], pair: Path, tmp_path: Path) -> None:
    """Between widths that differ, without a projection; packed rows are those in rows of their own."""
    settings = [RELATIONS, *CONSTANT, "gradient_accumulation_steps=1", "hidden_loss.weight=10", *settings]
    lines = tiny_runs.steps(distil(pair, tmp_path / "run", *settings, "max_steps=6"))
    assert lines[-1]["hidden_loss"] < 0.8 * lines[0]["hidden_loss"]
    settings += ["batch_size=10", "shuffle=false", "max_steps=1", "hidden_loss.tokens=all"]
    whole, packed = (
        tiny_runs.steps(distil(pair, tmp_path / name, *settings, f"dataset.packed={name}"))
        for name in ("false", "true")
    )
    assert packed[0] == pytest.approx(whole[0], rel=1e-4)


@pytest.mark.parametrize("projection", ["shared", "per_pair"])
def test_a_run_that_is_resumed(projection: str, pair: Path, tmp_path: Path) -> None:
    """Bit for bit: the projections are in its state, and not in any model's folder."""
    settings = [BOTH, f"hidden_loss.projection={projection}", "hidden_loss.projection_init=orthogonal"]
    settings += CONSTANT
    whole = distil(pair, tmp_path / "whole", *settings, "max_steps=6", "save_every_n_steps=6")
    run = distil(pair, tmp_path / "run", *settings, "max_steps=3", "save_every_n_steps=3")
    assert not (run / "checkpoints" / "step_00000003" / "beside").exists()
    distil(pair, run, *settings, "max_steps=6", "save_every_n_steps=6", "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(whole, run)
    states = [
        torch.load(folder / "checkpoints" / "step_00000006" / "training_state.pt")["beside"] for folder in (whole, run)
    ]
    assert len(states[0]) == {"shared": 2, "per_pair": 4}[projection]
    for name, weight in states[0].items():
        assert weight.shape == ((48, 32) if "weight" in name else (48,))
        assert torch.equal(weight, states[1][name])
    for folder in (whole / "model", whole / "checkpoints" / "step_00000006"):
        names = load_file(folder / "model.safetensors").keys()
        assert names == load_file(pair / "student" / "model.safetensors").keys()


def test_a_run_is_not_resumed_with_other_projections(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    projected = [BOTH, "hidden_loss.projection=shared"]
    for name, first, then, said in (
        ("more", [], projected, "was saved without beside"),
        ("less", projected, [], "was saved with beside"),
        ("other", projected, [BOTH, "hidden_loss.projection=per_pair"], "other projections"),
    ):
        distil(pair, tmp_path / name, *first, "max_steps=1", "save_every_n_steps=1")
        with pytest.raises(SystemExit):
            distil(pair, tmp_path / name, *then, "max_steps=2", "resume_from_checkpoint=true")
        assert said in capsys.readouterr().err


def test_a_cache_of_hidden_states(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the last norm: the steps that a live teacher gives."""
    kept = cache(pair, tmp_path / "cache", "store.kind=hidden", "store.hidden_dtype=fp32")
    settings = [NORM, "hidden_loss.projection=shared", "max_steps=4"]
    live = distil(pair, tmp_path / "live", *settings)
    cached = distil(pair, tmp_path / "cached", *settings, f"teacher.cache_dir={kept}")
    for line, expected in zip(tiny_runs.steps(cached), tiny_runs.steps(live), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    for given, said in (
        (RANGES, "has those of model.norm alone"),
        ("hidden_loss.tokens=all", "has those at labelled tokens alone"),
    ):
        with pytest.raises(SystemExit):
            distil(pair, tmp_path / "else", *settings, given, f"teacher.cache_dir={kept}")
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [NORM],
            "have 32 numbers and the teacher's 48, and hidden_loss compares them one by one. Give hidden_loss.proj",
        ),
        (
            [NORM.replace("teacher: model.norm", "teacher: model.nrom")],
            "Did you mean model.norm? The layers are 0 to 2.",
        ),
        (
            ["hidden_loss.relation_heads=5", RELATIONS],
            "hidden_loss.relation_heads is 5, and model.layers.0.self_attn.values has 16 numbers of a token",
        ),
        ([RELATIONS, "hidden_loss.projection=shared"], "the only ones here, compare any. Leave it out."),
        ([NORM, "hidden_loss.projection=shared", "hidden_loss.relation_heads=2"], "and there are none"),
        ([RELATIONS, "hidden_loss.inputs=teacher"], "beside model.layers.0.self_attn.values a residual stream goes on"),
        ([RELATIONS.replace("loss: relation", "loss: mse")], "loss mse: relation compares queries, keys or values"),
        ([NORM, "hidden_loss.name=relation"], "loss relation: relation compares queries, keys or values"),
        ([NORM, "kd_ratio=0"], "which kd_ratio=0 leaves out"),
        (["hidden_loss.weight=2"], "hidden_loss.pairs is empty"),
        ([NORM, "hidden_loss.weight=0"], "hidden_loss.weight must be > 0"),
        ([RANGES, "teacher.cache_dir={}"], "has samples of the teacher's distributions"),
    ],
)
def test_refusals(
    overrides: list[str], message: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a weight is read."""
    if "teacher.cache_dir={}" in overrides:
        cache(pair, tmp_path / "cache")
    with pytest.raises(SystemExit):
        distil(pair, tmp_path / "run", *(override.replace("{}", str(tmp_path / "cache")) for override in overrides))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
