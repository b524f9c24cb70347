"""What `knowledge_distillation` and `finetune` have in common: what they leave behind, refuse, and count."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import save_file
from tiny_runs import distil, finetune

from kdtune import checkpoint, data, devices, optim, planning, tokenizers
from kdtune.checkpoint import state
from kdtune.cli import catalog
from kdtune.cli.main import main
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.interrupt import Interrupt

Recipe = Callable[..., Path]
NAMES = {distil: "knowledge_distillation", finetune: "finetune"}
LOSSES = {distil: {"loss", "ce_loss", "kd_loss"}, finetune: {"loss"}}
VALIDATION = {
    distil: {
        "val_ce_loss",
        "val_kd_loss",
        "val_agreement",
        "val_entropy",
        "val_teacher_ce_loss",
        "val_teacher_entropy",
    },
    finetune: {"val_loss"},
}
SPEAKERS = ("prompt", "teacher", "student", "model")
SHORT = ["epochs=1", "lr_scheduler.num_warmup_steps=1"]  # three steps


@pytest.fixture(params=[distil, finetune], ids=lambda recipe: recipe.__name__)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], Any]) -> str:
    """The one message with which a call ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("kdtune: error: ")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("name", ["knowledge_distillation", "finetune"])
def test_the_tiny_config(name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", f"output_dir={tmp_path / 'run'}"]
    if name == "knowledge_distillation":
        overrides.append(f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}")
    main(["run", name, "--config", "tiny", *overrides])
    losses = [line["loss"] for line in tiny_runs.steps(tmp_path / "run")]
    assert len(losses) == 4
    out = capsys.readouterr().out
    assert "24 rows" in out
    assert f"kdtune run generate checkpointer.checkpoint_dir={tmp_path / 'run/model'} device=cpu dtype=fp32" in out


def test_what_a_run_leaves_behind(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    overrides = [*tiny_runs.validated_on(tiny), "save_every_n_steps=2", "run_val_every_n_steps=2", *SHORT]
    run = recipe(tiny, tmp_path / "run", *overrides)
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "recipe.py", "versions.json", "metrics.jsonl", "checkpoints", "model")
    }
    source = catalog.find_recipe(NAMES[recipe])
    assert (run / "recipe.py").read_bytes() == source.read_bytes()
    schema = load_module(source).Config
    argv = tiny_runs.arguments(tiny, run, *overrides, recipe=NAMES[recipe])
    assert load(schema, run / "config.yaml", []) == load(schema, None, argv[2:])

    lines = tiny_runs.lines(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 3]
    trained = {"step", "lr", "grad_norm", "num_tokens", "tokens_per_second", "peak_memory_gib"} | LOSSES[recipe]
    validated = {"step"} | VALIDATION[recipe]
    assert [set(line) for line in lines] == [validated, trained, trained, validated, trained, validated]
    assert all(value is not None and math.isfinite(value) for line in lines for value in line.values())
    assert all(0 < line["peak_memory_gib"] < 64 for line in lines if "loss" in line)

    model_files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (run / "model").iterdir()} == model_files
    (saved,) = (run / "checkpoints").iterdir()
    assert {path.name for path in saved.iterdir()} == {*model_files, "training_state.pt"}
    assert saved.name == "step_00000003"
    tiny_runs.assert_same_weights(saved, run / "model")


def test_the_model_opens_in_transformers(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    import transformers

    folder = recipe(tiny, tmp_path / "run", *SHORT) / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = checkpoint.load_model(folder, dtype=torch.float32, device="cpu")
    text = transformers.AutoTokenizer.from_pretrained(folder)("Question: Tom has 3 apples", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(text.input_ids), theirs(text.input_ids).logits, atol=1e-5, rtol=0)


def test_recorded_settings_and_recipe_repeat_the_run(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    first = recipe(tiny, tmp_path / "first", *SHORT)
    again = tmp_path / "again"
    main(["run", str(first / "recipe.py"), "--config", str(first / "config.yaml"), f"output_dir={again}"])
    tiny_runs.assert_same_run(first, again)


def test_samples_are_printed(recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(tiny, tmp_path / "run", *SHORT, "sample_prompts=[Tom has, He has]", "sample_max_new_tokens=2")
    found = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.split(":")[0] in SPEAKERS]
    assert found == ["prompt", *(["teacher", "student"] if recipe is distil else ["model"])] * 2


# Counting.


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["epochs=2"], 6),
        (["epochs=2", "gradient_accumulation_steps=1"], 10),
        (["epochs=2", "max_steps_per_epoch=2"], 4),
        (["epochs=2", "max_steps=5"], 5),
        (["epochs=2", "max_steps=50"], 6),
        (["epochs=1", "batch_size=64"], 1),
    ],
)
def test_number_of_steps(overrides: list[str], expected: int, tiny: Path, tmp_path: Path) -> None:
    run = finetune(tiny, tmp_path / "run", "lr_scheduler.num_warmup_steps=0", *overrides)
    found = tiny_runs.steps(run)
    assert [line["step"] for line in found] == list(range(1, expected + 1))
    assert found[0]["lr"] == 0.01


def test_log_every_n_steps(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    every = recipe(tiny, tmp_path / "every", "max_steps=8")
    fourth = recipe(tiny, tmp_path / "fourth", "max_steps=8", "log_every_n_steps=3")
    expected = [line for line in tiny_runs.steps(every) if line["step"] in (3, 6, 8)]
    assert tiny_runs.steps(fourth) == expected
    tiny_runs.assert_same_weights(every / "model", fourth / "model")


def test_watching_changes_nothing(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    plain = recipe(tiny, tmp_path / "plain")
    watching = ["run_val_every_n_steps=1", "save_every_n_steps=2", "sample_prompts=[Tom]", "sample_max_new_tokens=2"]
    watched = recipe(tiny, tmp_path / "watched", *tiny_runs.validated_on(tiny), *watching)
    assert tiny_runs.steps(watched) == tiny_runs.steps(plain)
    tiny_runs.assert_same_weights(plain / "model", watched / "model")


@pytest.mark.parametrize("shuffle", [True, False])
def test_order(shuffle: bool, recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    run = recipe(tiny, tmp_path / "run", f"shuffle={shuffle}")
    other_seed = recipe(tiny, tmp_path / "other_seed", f"shuffle={shuffle}", "seed=1")
    per_step = [line["num_tokens"] for line in tiny_runs.steps(run)]
    assert (per_step[:3] == per_step[3:6] == per_step[6:]) == (not shuffle)
    assert (tiny_runs.steps(run) == tiny_runs.steps(other_seed)) == (not shuffle)


def test_validation_is_the_loss_of_its_rows(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    """All rows in one step: its loss, taken before the weights move, is that of the validation before training."""
    all_rows = [f"dataset_val.source={tiny / 'rows.jsonl'}", "dataset_val.format=completion", "batch_size=3"]
    one_step = ["gradient_accumulation_steps=4", "epochs=1", "lr_scheduler.num_warmup_steps=0"]
    before, step, after = tiny_runs.lines(recipe(tiny, tmp_path / "run", *all_rows, *one_step))
    for key in LOSSES[recipe] - ({"loss"} if recipe is distil else set()):
        assert step[key] == pytest.approx(before[f"val_{key}"], rel=1e-5)
        assert step[key] != pytest.approx(after[f"val_{key}"], rel=1e-3)


def test_clipping(tiny: Path, tmp_path: Path) -> None:
    smooth = ["optimizer.eps=1", "optimizer.weight_decay=0", "max_steps=1", "lr_scheduler.num_warmup_steps=0"]
    start = tiny_runs.weights(tiny / "student")

    def moved(limit: str) -> tuple[float, float]:
        run = finetune(tiny, tmp_path / limit, *smooth, f"clip_grad_norm={limit}")
        found = tiny_runs.weights(run / "model")
        distance = math.sqrt(sum(float((found[name] - start[name]).square().sum()) for name in start))
        return distance, tiny_runs.steps(run)[0]["grad_norm"]

    (free, norm), (clipped, norm_clipped), (loose, _) = moved("null"), moved("0.01"), moved("1000")
    assert norm == norm_clipped > 0.1, "the norm that is logged is that before clipping"
    assert free == loose
    assert clipped == pytest.approx(0.01 * 0.01, rel=0.1)  # lr * norm


def test_tensorboard(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    run = recipe(tiny, tmp_path / "run", *SHORT, *tiny_runs.validated_on(tiny), "metric_logger.tensorboard=true")
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {key for line in tiny_runs.lines(run) for key in line} - {"step"}
    for key in LOSSES[recipe] | VALIDATION[recipe]:
        found = [(event.step, event.value) for event in events.Scalars(key)]
        written = [(line["step"], pytest.approx(line[key])) for line in tiny_runs.lines(run) if key in line]
        assert found == written


def test_tensorboard_of_a_resumed_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    next_step, calls = data.Loader.next_step, 0

    def failing(loader: data.Loader) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("a crash")
        return next_step(loader)

    monkeypatch.setattr(data.Loader, "next_step", failing)
    settings = ["metric_logger.tensorboard=true", "save_every_n_steps=3", "resume_from_checkpoint=true"]
    with pytest.raises(RuntimeError, match="a crash"):
        finetune(tiny, tmp_path, *settings)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    assert [event.step for event in events.Reload().Scalars("loss")] == [1, 2, 3, 4, 5], "nothing waits in a buffer"
    finetune(tiny, tmp_path, *settings)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    assert [event.step for event in events.Reload().Scalars("loss")] == list(range(1, 10))


# Precision.


def test_bf16(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    run = recipe(tiny, tmp_path / "bf16", *SHORT, "dtype=bf16")
    exact = recipe(tiny, tmp_path / "fp32", *SHORT)
    assert all(weight.dtype == torch.bfloat16 for weight in tiny_runs.weights(run / "model").values())
    assert json.loads((run / "model/config.json").read_text())["dtype"] == "bfloat16"
    for line, expected in zip(tiny_runs.steps(run), tiny_runs.steps(exact), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_save_dtype(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    run = recipe(tiny, tmp_path / "run", *SHORT, "save_every_n_steps=2", "save_dtype=bf16")
    (saved,) = (run / "checkpoints").iterdir()
    resumed_from, finished = tiny_runs.weights(saved), tiny_runs.weights(run / "model")
    assert all(weight.dtype == torch.float32 for weight in resumed_from.values()), "nothing is lost when resuming"
    assert all(torch.equal(weight, resumed_from[name].bfloat16()) for name, weight in finished.items())


@pytest.mark.parametrize("precision", ["fp32", "stochastic"])
def test_save_dtype_of_masters(precision: str, recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    """Of bf16 weights, a float32 model has the bits that their steps keep beside them, if they do."""
    settings = ["dtype=bf16", f"optimizer.precision={precision}", "save_every_n_steps=2", "save_dtype=fp32"]
    run = recipe(tiny, tmp_path / "run", *SHORT, *settings)
    (saved,) = (run / "checkpoints").iterdir()
    trained, finished = tiny_runs.weights(saved), tiny_runs.weights(run / "model")
    state = torch.load(saved / "training_state.pt")["optimizer"]["state"]
    rests = sum(int(moments["rest"].count_nonzero()) for moments in state.values() if "rest" in moments)
    assert all(weight.dtype == torch.float32 for weight in finished.values())
    assert sum(int((weight != trained[name]).sum()) for name, weight in finished.items()) == rests
    assert (rests > 0) == (precision == "fp32")
    for name, weight in finished.items():
        torch.testing.assert_close(weight, trained[name].float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("asked", [True, False])
def test_activation_checkpointing_is_on_when_asked(
    asked: bool, recipe: Recipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("kdtune.models.enable_activation_checkpointing", lambda *args: calls.append(args))
    mode = ["activation_checkpointing_mode=selective"] * asked
    recipe(tiny, tmp_path / "run", *SHORT, f"enable_activation_checkpointing={asked}", *mode)
    expected = [(1, "selective", False)] * asked  # of the student, which alone has a backward
    assert [(model.config.num_layers, *how) for model, *how in calls] == expected


# Where a model starts.


def test_keep_layers(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    start = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "checkpointer.keep_layers=[1]"]
    run = recipe(tiny, tmp_path / "run", *start, *SHORT, "optimizer.lr=1e-12", "optimizer.weight_decay=0")
    expected, found = tiny_runs.weights(tiny / "teacher"), tiny_runs.weights(run / "model")
    assert json.loads((run / "model/config.json").read_text())["num_hidden_layers"] == 1
    assert sum(name.startswith("model.layers.") for name in found) == 9
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name.replace("layers.0.", "layers.1.")], atol=1e-6, rtol=0)


def test_random_weights(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    shape_only = tmp_path / "shape"
    shape_only.mkdir()
    for path in (tiny / "student").iterdir():
        if path.name != "model.safetensors":
            (shape_only / path.name).write_bytes(path.read_bytes())
    start = [f"checkpointer.checkpoint_dir={shape_only}", "checkpointer.random_weights=true", "epochs=6"]
    runs = [recipe(tiny, tmp_path / f"run{i}", *start, f"seed={seed}") for i, seed in enumerate((0, 0, 1))]
    losses = [line["loss"] for line in tiny_runs.steps(runs[0])]
    assert losses[-1] < losses[0] - 1
    tiny_runs.assert_same_run(runs[0], runs[1])
    assert tiny_runs.steps(runs[2])[0] != tiny_runs.steps(runs[0])[0]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_tokenizer_of_its_own(kind: str, recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    bare, tokenizer = tmp_path / "bare", tmp_path / "tokenizer"
    for folder in (bare, tokenizer):
        folder.mkdir()
    for path in (tiny / "student").iterdir():
        (tokenizer if "tokenizer" in path.name else bare).joinpath(path.name).write_bytes(path.read_bytes())
    given = tokenizer if kind == "folder" else tokenizer / "tokenizer.json"
    run = recipe(tiny, tmp_path / "run", f"checkpointer.checkpoint_dir={bare}", f"tokenizer.path={given}", *SHORT)
    assert (run / "model/tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    main(
        [
            "run",
            "generate",
            f"checkpointer.checkpoint_dir={run / 'model'}",
            "device=cpu",
            "max_new_tokens=2",
            "prompt=Tom",
        ]
    )


# Numbers that are none.


def test_a_loss_that_is_no_number(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = ["optimizer.lr=1e15", "clip_grad_norm=null", "save_every_n_steps=1", "lr_scheduler.num_warmup_steps=0"]
    message = refused(capsys, lambda: recipe(tiny, run, *settings))
    assert "The loss of step" in message
    assert not (run / "model").exists()
    newest = state.latest(run)
    assert newest is not None
    assert str(newest) in message
    assert all(weight.isfinite().all() for weight in tiny_runs.weights(newest).values())
    assert all(line["loss"] is not None for line in tiny_runs.lines(run))


def test_broken_start_weights(recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (tiny / "student").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = tiny_runs.weights(broken)
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    message = refused(capsys, lambda: recipe(tiny, run, f"checkpointer.checkpoint_dir={broken}"))
    assert "The loss of step 1 is" in message
    assert "No checkpoint was saved before" in message
    assert not (run / "model").exists()


def test_weights_that_are_no_numbers_replace_nothing(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is a number, its gradient is not. Seen where it is logged, else when the weights are saved."""
    whole = recipe(tiny, tmp_path / "whole", *SHORT)
    broken_step = 3
    clip = optim.AdamW.clip_grad_norm
    calls = 0

    def breaking(optimizer: optim.AdamW, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == broken_step:
            optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        return clip(optimizer, *args)

    monkeypatch.setattr(optim.AdamW, "clip_grad_norm", breaking)
    run = tmp_path / "run"
    message = refused(capsys, lambda: recipe(tiny, run, *SHORT, "save_every_n_steps=2"))
    assert "norm of its gradient nan. The step was not applied" in message
    assert not (run / "model").exists()
    newest = state.latest(run)
    assert newest is not None
    assert newest.name == "step_00000002"
    calls, broken_step = 0, 1
    unseen = [*SHORT, "save_every_n_steps=2", "log_every_n_steps=9"]
    assert "not finite" in refused(capsys, lambda: recipe(tiny, tmp_path / "unseen", *unseen))
    assert state.latest(tmp_path / "unseen") is None
    monkeypatch.undo()
    recipe(tiny, run, *SHORT, "save_every_n_steps=2", "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(whole, run)


# Output folders.


def test_a_run_is_not_overwritten_unasked(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe(tiny, tmp_path / "run", *SHORT)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "already holds a run" in refused(capsys, lambda: recipe(tiny, run, *SHORT))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    (run / "notes.txt").write_text("mine")
    recipe(tiny, run, "max_steps=2", "lr_scheduler.num_warmup_steps=0", "overwrite_output_dir=true")
    assert [line["step"] for line in tiny_runs.lines(run)] == [1, 2]
    assert (run / "notes.txt").read_text() == "mine"


def test_a_dry_run_touches_nothing(
    recipe: Recipe, tiny: Path, tmp_path: Path, planned: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe(tiny, tmp_path / "run", *SHORT)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    recipe(tiny, run, "overwrite_output_dir=true", "--dry-run")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    recipe(tiny, tmp_path / "new", "--dry-run")
    assert not (tmp_path / "new").exists()
    out = capsys.readouterr().out
    assert "9 steps, fp32" in out
    assert "memory    about" in out


def test_a_plan_changes_nothing(
    recipe: Recipe, tiny: Path, tmp_path: Path, planned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_bits = [*SHORT, "optimizer.name=adamw_8bit"]
    planned_run = recipe(tiny, tmp_path / "planned", *few_bits)
    monkeypatch.setattr(planning, "describe", lambda *_: "not planned")
    assert tiny_runs.numbers(planned_run) == tiny_runs.numbers(recipe(tiny, tmp_path / "unplanned", *few_bits))


def test_resuming_without_a_checkpoint_starts(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    plain = recipe(tiny, tmp_path / "plain", *SHORT)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (resumed / "versions.json").touch()
    (resumed / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"st')  # a run that died before it saved
    recipe(tiny, resumed, *SHORT, "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(plain, resumed)


def test_resuming_a_finished_run_changes_nothing(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SHORT, "save_every_n_steps=2", *tiny_runs.validated_on(tiny)]
    run = recipe(tiny, tmp_path / "run", *settings)
    before, table = tiny_runs.lines(run), capsys.readouterr().out.splitlines()
    weights = tiny_runs.weights(run / "model")
    recipe(tiny, run, *settings, "resume_from_checkpoint=true")
    assert tiny_runs.lines(run) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny_runs.weights(run / "model").items())
    shown = [line for line in table if line.startswith(("student before", "student after", "validation loss"))]
    assert shown
    assert set(shown) <= set(capsys.readouterr().out.splitlines())


def test_a_finished_run_goes_on_with_more_epochs(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    constant = ["lr_scheduler.name=constant", "lr_scheduler.num_warmup_steps=1"]
    whole = recipe(tiny, tmp_path / "whole", *constant, "epochs=2")
    run = recipe(tiny, tmp_path / "run", *constant, "epochs=1", "save_every_n_steps=100")
    recipe(tiny, run, *constant, "epochs=2", "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(whole, run)


def test_a_resumed_run_follows_its_settings(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    whole = recipe(tiny, tmp_path / "whole")
    rates = [line["lr"] for line in tiny_runs.steps(whole)]
    run = recipe(tiny, tmp_path / "run", *SHORT, "save_every_n_steps=3")
    recipe(tiny, run, "optimizer.lr=0.005", "resume_from_checkpoint=true")
    assert [line["lr"] for line in tiny_runs.steps(run)][3:] == pytest.approx([rate / 2 for rate in rates[3:]])


def test_validation_may_come_when_resuming(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to compare the end with, which is no reason to fail after the training."""
    run = recipe(tiny, tmp_path / "run", *SHORT, "save_every_n_steps=2")
    validated = [*tiny_runs.validated_on(tiny), "resume_from_checkpoint=true"]
    recipe(tiny, run, "epochs=2", *validated)
    out = capsys.readouterr().out
    assert "before" not in out
    assert ", 3 done" in out
    assert "this run ends after step 1" in refused(capsys, lambda: recipe(tiny, run, "max_steps=1", *validated))
    assert (run / "model").is_dir()


def test_resuming_with_another_architecture_is_refused(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(tiny, tmp_path / "run", *SHORT, "save_every_n_steps=2")
    monkeypatch.setattr(checkpoint, "load_model", None)  # refused before a weight is read
    monkeypatch.setattr(checkpoint, "load_start", None)
    other = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "epochs=2", "resume_from_checkpoint=true"]
    message = refused(capsys, lambda: recipe(tiny, run, *other))
    assert "step_00000003" in message
    assert "checkpointer" in message


def test_resuming_with_other_rows_is_refused(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(tiny, tmp_path / "run", *SHORT, "save_every_n_steps=2")
    monkeypatch.setattr(checkpoint, "load_model", None)  # refused before a weight is read
    monkeypatch.setattr(checkpoint, "load_start", None)
    other = ["dataset.split=[:8]", "epochs=3", "resume_from_checkpoint=true"]
    assert "cannot continue in dataset" in refused(capsys, lambda: recipe(tiny, run, *other))
    assert len(tiny_runs.lines(run)) == 3, "nothing of the run is lost"


def test_a_signal_between_two_looks_is_not_lost(
    recipe: Recipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the signal comes, what is said to be saved is the step that was done."""
    looks = 0
    when = 0

    class Late(Interrupt):
        @property
        def received(self) -> signal.Signals | None:
            nonlocal looks
            looks += 1
            return signal.SIGTERM if looks >= when else None

        @received.setter
        def received(self, value: signal.Signals | None) -> None:
            pass

    monkeypatch.setattr("kdtune.interrupt.Interrupt", Late)
    for when in (1, 2, 3, 4):
        looks = 0
        run = tmp_path / str(when)
        with pytest.raises(SystemExit):
            recipe(tiny, run)
        newest = state.latest(run)
        assert newest is not None
        done = torch.load(newest / state.STATE_FILE)["step"]
        assert done == tiny_runs.steps(run)[-1]["step"]


# Refused before weights are read.


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a weight fails."""
    monkeypatch.setattr("kdtune.checkpoint.source.read_into", None)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=0"], "batch_size"),
        (["activation_checkpointing_mode=selective"], "enable_activation_checkpointing=false"),
        (["enable_activation_checkpointing=true", "enable_activation_offloading=true"], "device=cpu computes there"),
        (["metric_logger.wandb_project=kd"], "wandb, which is not installed"),
        (["tokenizer.max_seq_len=129"], "built for 128 positions"),
        (["dataset.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["checkpointer.checkpoint_dir=nowhere"], "nowhere is not a folder"),
        (["checkpointer.keep_layers=[0, 7]"], "keep_layers"),
        (["tokenizer.max_seq_len=4"], "have nothing to train on: 10 are without"),
        pytest.param(
            ["device=cuda"],
            "device=cuda, but torch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusals(
    overrides: list[str],
    message: str,
    recipe: Recipe,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    assert message in refused(capsys, lambda: recipe(tiny, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_no_space_on_the_disk(
    recipe: Recipe,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refused(capsys, lambda: recipe(tiny, tmp_path / "run", "save_every_n_steps=2"))
    assert "1000 B free" in message


@pytest.mark.usefixtures("no_weights")
def test_copies_for_the_background(
    recipe: Recipe,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their memory is announced, and refused where the host lacks it; without checkpoints there are none."""
    settings = ["save_in_background=true", "save_every_n_steps=2"]
    recipe(tiny, tmp_path / "run", *settings, "--dry-run")
    (needed,) = re.findall(r"; checkpoints are written from a copy, (\d+ KiB) of host memory", capsys.readouterr().out)
    monkeypatch.setattr(devices, "free_host_memory", lambda: 1000)
    message = refused(capsys, lambda: recipe(tiny, tmp_path / "run", *settings))
    assert f"takes {needed} on this machine, and 1000 B are free" in message
    message = refused(capsys, lambda: recipe(tiny, tmp_path / "run", settings[0]))
    assert "save_every_n_steps, which is 0" in message


def test_it_learns(recipe: Recipe, tiny: Path, trained: Path, tmp_path: Path) -> None:
    overrides = [*tiny_runs.validated_on(tiny), "epochs=8"]
    if recipe is distil:
        overrides.append(f"teacher_checkpointer.checkpoint_dir={trained}")
    run = recipe(tiny, tmp_path / "run", *overrides)
    key = "val_kd_loss" if recipe is distil else "val_loss"
    before, after = (line[key] for line in tiny_runs.lines(run) if key in line)
    assert after < 0.5 * before


def test_batches_are_those_of_the_loader(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    """Each epoch has every label once, whatever the order."""
    run = recipe(tiny, tmp_path / "run")
    per_step = [line["num_tokens"] for line in tiny_runs.steps(run)]
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    total = data.load(cfg, tokenizers.load(tiny / "student"), 64).num_labels
    assert [sum(per_step[epoch : epoch + 3]) for epoch in (0, 3, 6)] == [total] * 3
