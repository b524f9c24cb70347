"""The record of some steps: read back, of the right steps, and without a trace in the run's numbers."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import distil, finetune

from kdtune.profiling import ProfilerConfig, check_profiler

RECORDED = [
    "profiler.enabled=true",
    "profiler.wait_steps=1",
    "profiler.warmup_steps=1",
    "profiler.active_steps=2",
]


def events(path: Path) -> Counter[str]:
    with gzip.open(path, "rt") as file:
        return Counter(event["name"] for event in json.load(file)["traceEvents"] if "name" in event)


@pytest.mark.parametrize(("recipe", "phases"), [(distil, ["teacher", "student"]), (finetune, ["model"])])
def test_the_trace_has_the_phases_of_the_active_steps(
    recipe: Callable[..., Path], phases: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe(tiny, tmp_path / "run", *RECORDED)
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "steps_3_to_4.json.gz"
    found = events(trace)
    micro_batches = 1 + 2  # of the two rows that end the first epoch, and of four that begin the next
    assert {name: found[name] for name in (*phases, "loss", "backward")} == dict.fromkeys(
        (*phases, "loss", "backward"), micro_batches
    )
    assert found["Optimizer.step#AdamW.step"] == 2
    assert found["aten::mm"] > 10 * micro_batches
    out = capsys.readouterr().out
    assert str(trace) in out
    assert "aten::" in out.partition("operator ")[2]


def test_recording_changes_no_number(tiny: Path, tmp_path: Path) -> None:
    plain = distil(tiny, tmp_path / "plain", "epochs=2")
    memory = ["profiler.profile_memory=true", "profiler.with_stack=true"]
    tiny_runs.assert_same_run(plain, distil(tiny, tmp_path / "recorded", "epochs=2", *RECORDED, *memory))
    (trace,) = (tmp_path / "recorded" / "profile").iterdir()
    assert events(trace)["[memory]"] > 0


def test_a_resumed_run_records_steps_of_its_own_and_another_run_keeps_none(tiny: Path, tmp_path: Path) -> None:
    constant = "lr_scheduler.name=constant"  # which does not depend on the number of steps
    whole = distil(tiny, tmp_path / "whole", constant)
    run = distil(tiny, tmp_path / "run", constant, "max_steps=6", "save_every_n_steps=6", *RECORDED)
    distil(tiny, run, constant, *RECORDED, "resume_from_checkpoint=true")
    assert sorted(path.name for path in (run / "profile").iterdir()) == ["steps_3_to_4.json.gz", "steps_9_to_9.json.gz"]
    tiny_runs.assert_same_weights(whole / "model", run / "model")
    distil(tiny, run, "max_steps=1", "overwrite_output_dir=true")
    assert not (run / "profile").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"with_stack": True}, "profiler.with_stack=True is about a record.*profiler.enabled=true"),
        ({"enabled": True, "wait_steps": 9}, "= 14, and the run has 13 steps"),
    ],
)
def test_refused(settings: dict[str, int], message: str) -> None:
    check_profiler(ProfilerConfig(), 0)
    check_profiler(ProfilerConfig(enabled=True), 13)
    with pytest.raises(ValueError, match=message):
        check_profiler(ProfilerConfig(**settings), 13)
