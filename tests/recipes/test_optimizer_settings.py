"""The optimizer's settings in runs of both recipes: what they refuse, and what they must not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import distil, finetune

from kdtune import checkpoint, optim
from kdtune.optim import OptimizerConfig, check_optimizer

Recipe = Callable[..., Path]
PLAIN = ["gradient_accumulation_steps=1", "clip_grad_norm=null", "epochs=1", "lr_scheduler.num_warmup_steps=1"]


@pytest.fixture(params=[distil, finetune], ids=lambda recipe: recipe.__name__)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


REFUSED = {
    "here float32 is trained": {"cfg": OptimizerConfig(precision="stochastic"), "dtype": torch.float32},
    "device=cpu has no other memory": {"cfg": OptimizerConfig(offload=True), "device": torch.device("cpu")},
    "optimizer.name=adamw to offload": {"cfg": OptimizerConfig(name="adamw_8bit", offload=True)},
    "gradient_accumulation_steps=2 asks for one step": {"in_backward": True, "gradient_accumulation_steps": 2},
    "clip_grad_norm=1.0 shrinks the gradient by its norm": {"in_backward": True, "clip_grad_norm": 1.0},
}
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"cfg": OptimizerConfig(precision="fp32"), "dtype": torch.float32},
    {"cfg": OptimizerConfig(offload=True)},
    {"cfg": OptimizerConfig(name="adamw_8bit", precision="fp32"), "in_backward": True},
    {"gradient_accumulation_steps": 2, "clip_grad_norm": 1.0},
]


def check(**changes: Any) -> None:
    settings = {
        "cfg": OptimizerConfig(),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda"),
        "in_backward": False,
        "clip_grad_norm": None,
        "gradient_accumulation_steps": 1,
        **changes,
    }
    check_optimizer(settings.pop("cfg"), **settings)


@pytest.mark.parametrize("reason", REFUSED)
def test_settings_that_exclude_each_other(reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(**REFUSED[reason])


@pytest.mark.parametrize("settings", ACCEPTED)
def test_settings_that_do_not(settings: dict[str, Any]) -> None:
    check(**settings)


def test_it_is_refused_before_anything_is_read(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in ("optimizer.precision=nearest", "optimizer.offload=true", "optimizer_in_bwd=true"):
        with pytest.raises(SystemExit):
            recipe(tiny, tmp_path / "run", setting)
        message = capsys.readouterr().err
        assert setting in message
        assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_steps_in_the_backward_change_nothing(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    settings = [*PLAIN, "dtype=bf16", "optimizer.name=adamw_8bit", "save_every_n_steps=2"]
    after = recipe(tiny, tmp_path / "after", *settings)
    within = recipe(tiny, tmp_path / "within", *settings, "optimizer_in_bwd=true")
    tiny_runs.assert_same_run(after, within)
    assert all(line["grad_norm"] > 0 for line in tiny_runs.steps(within))


def test_a_step_that_was_taken_before_it_was_looked_at(
    recipe: Recipe, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*PLAIN, "optimizer.lr=1e15", "optimizer_in_bwd=true", "lr_scheduler.num_warmup_steps=0"]
    with pytest.raises(SystemExit):
        recipe(tiny, tmp_path / "run", *settings)
    assert "was applied within the backward (optimizer_in_bwd=true)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "optimizer",
    [
        ["optimizer.name=adamw_8bit"],
        ["optimizer.name=adamw_4bit", "optimizer.precision=fp32"],
    ],
    ids=" ".join,
)
def test_a_run_resumes(optimizer: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With codes, and weights that are drawn or have rests. Each way by itself: `tests/optim`."""
    settings = ["dtype=bf16", *optimizer, "epochs=2", "save_every_n_steps=2"]
    whole = finetune(tiny, tmp_path / "whole", *settings)
    save = checkpoint.Run.save

    def dying(run: checkpoint.Run, in_background: bool) -> Path:
        save(run, in_background)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Run, "save", dying)
    with pytest.raises(SystemExit):
        finetune(tiny, tmp_path / "resumed", *settings)
    monkeypatch.undo()
    tiny_runs.assert_same_run(whole, finetune(tiny, tmp_path / "resumed", *settings, "resume_from_checkpoint=true"))


def test_they_learn_alike(tiny: Path, tmp_path: Path) -> None:
    """Ten rows by heart: from 7.7 nats to 1.6, with moments of 8 bits and drawn weights as with float32 ones."""
    ways = {
        "float32": ["dtype=fp32"],
        "masters": ["dtype=bf16"],
        "8bit": ["dtype=bf16", "optimizer.name=adamw_8bit"],
    }
    start = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "epochs=8", "lr_scheduler.num_warmup_steps=2"]
    losses = {
        name: [line["loss"] for line in tiny_runs.steps(finetune(tiny, tmp_path / name, *start, *settings))]
        for name, settings in ways.items()
    }
    assert losses["float32"][0] > 7
    assert losses["float32"][-1] < 1.7
    for name in ways:
        assert losses[name][-1] == pytest.approx(losses["float32"][-1], rel=0.01), name


def test_sums_of_micro_batches_are_float32(
    recipe: Recipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    clip = optim.AdamW.clip_grad_norm

    def looking(optimizer: optim.AdamW, max_norm: float | None) -> torch.Tensor:
        seen.update(p.grad.dtype for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        return clip(optimizer, max_norm)

    monkeypatch.setattr(optim.AdamW, "clip_grad_norm", looking)
    recipe(tiny, tmp_path / "two", "dtype=bf16", "max_steps=1", "lr_scheduler.num_warmup_steps=0")
    assert seen == {torch.float32}
    seen.clear()
    recipe(tiny, tmp_path / "one", "dtype=bf16", *PLAIN)
    assert seen == {torch.bfloat16}
