"""`kdtune sweep`: which runs there are, going on after a stop, the table, and what it refuses."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from kdtune.cli.sweep import last_values, split_values, spread

from .conftest import Run

RECIPE = '''"""Pretend to train."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from kdtune.config import MISSING, setting


@dataclass
class Config:
    output_dir: str = setting(MISSING, path=True)  # where everything goes
    ratio: float = 0.0  # moves the loss
    layers: list[int] = setting([])  # a list
    text: str = ""  # a text
    metric: str = "val_ce_loss"  # what it is validated by
    device: str = "cpu"  # where
    seed: int = 0  # moves the loss a little
    overwrite_output_dir: bool = False  # delete what is there
    resume_from_checkpoint: bool = False  # go on


def check(cfg):
    pass


def main(cfg):
    if cfg.ratio > 1 and not Path("mended").exists():
        raise ValueError("ratio is above 1")
    folder = Path(cfg.output_dir)
    folder.mkdir(exist_ok=True)
    with open("calls", "a") as calls:
        calls.write(f"{folder.name} {cfg.device} {cfg.overwrite_output_dir} {cfg.resume_from_checkpoint}\\n")
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, cfg.metric: cfg.ratio + cfg.seed / 10}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
'''


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kdtune: Run) -> Run:
    (tmp_path / "train.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return lambda *argv: kdtune("sweep", "./train.py", "output_dir=out", *argv)


def runs() -> dict[str, dict[str, Any]]:
    found = json.loads(Path("out/sweep.json").read_text())
    assert found["kdtune_sweep"] == 1
    return {run["name"]: run for run in found["runs"]}


def calls() -> list[str]:
    """What was run since it was asked last: run, device, overwrite_output_dir, resume_from_checkpoint."""
    lines = Path("calls").read_text().splitlines()
    Path("calls").unlink()
    return lines


def test_table_averages_over_seeds_alone(sweep: Run) -> None:
    status, out, err = sweep("--jobs", "2", "ratio=0.25,1", "seed=0,1,2", "text=as it is")
    assert (status, err) == (0, "")
    assert list(runs()) == [f"ratio={ratio},seed={seed}" for ratio in ("0.25", "1") for seed in (0, 1, 2)]
    assert runs()["ratio=1,seed=2"]["overrides"] == ["text=as it is", "ratio=1", "seed=2"]
    table = Path("out/sweep.md").read_text()
    assert table in out
    values = [0.25, 0.35, 0.45]
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    assert [line.replace(" ", "") for line in table.splitlines()] == [
        "|ratio|runs|val_ce_loss|",
        "|-------|-----:|------------:|",
        f"|0.25|3|{mean:.2f}±{deviation:.2f}|",
        "|1|3|1.10±0.10|",
    ]
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned


def test_table_has_what_finetune_is_validated_by(sweep: Run) -> None:
    assert sweep("seed=1,2", "metric=val_loss")[0] == 0
    assert Path("out/sweep.md").read_text().splitlines()[0].split() == ["|", "runs", "|", "val_loss", "|"]


def test_table_has_the_main_metrics_of_evaluations(sweep: Run) -> None:
    shift = "    folder.mkdir(exist_ok=True)\n"
    evaluates = (
        shift
        + """    from kdtune.evaluation import estimates
    from kdtune.evaluation.results import Evaluation, Example, Model, write
    examples = [Example("text", str(i), "ab"[i], 2, 0, {"ce": 4 * (i + cfg.ratio), "entropy": 1.0}) for i in (0, 1)]
    quiz = [Example("quiz", "0", values={"acc": cfg.seed / 4, "acc_norm": 0.0})]
    model = Model("m", 1, 1, 1, 1, "fp32", None, "f")
    found = [*estimates.results("text", examples), estimates.result("quiz", quiz, others={
        name: estimates.Definition("", "share", "higher") for name in ("acc", "acc_norm")})]
    write(folder, Evaluation(model, None, "tok", found, [], 1.0, 1.0), examples + quiz)
    return
"""
    )
    Path("train.py").write_text(RECIPE.replace(shift, evaluates))
    status, out, _ = sweep("ratio=0.5,1", "seed=1,2")
    assert status == 0
    assert "text ce 2.0000, quiz acc 0.2500" in out
    assert [line.replace(" ", "") for line in Path("out/sweep.md").read_text().splitlines() if "--" not in line] == [
        "|ratio|runs|textce|quizacc|",
        "|0.5|2|2.0000±0.0000|0.38±0.18|",
        "|1|2|3.0000±0.0000|0.38±0.18|",
    ]


def test_a_run_that_diverged_does_not_show_its_last_finite_number(tmp_path: Path) -> None:
    lines = [{"step": 0, "val_ce_loss": 2.5}, {"step": 8, "val_ce_loss": None}, {"step": 9, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = last_values(tmp_path)
    assert math.isnan(found["val_ce_loss"])
    assert found["loss"] == 3.0
    assert spread([found["val_ce_loss"], 2.5]) == spread([found["val_ce_loss"]]) == "nan"


def test_the_same_call_runs_only_what_is_not_done(sweep: Run) -> None:
    status, out, err = sweep("ratio=0,2", "seed=0,1")
    assert status == 1
    assert "ratio is above 1" in out
    assert "2 of 4 runs failed: ratio=2,seed=0, ratio=2,seed=1" in err
    assert [run["state"] for run in runs().values()] == ["done", "done", "failed", "failed"]
    assert [line.split()[0] for line in calls()] == ["ratio=0,seed=0", "ratio=0,seed=1"]

    Path("mended").touch()
    (Path("out") / "ratio=2,seed=1" / "checkpoints" / "step_1").mkdir(parents=True)
    assert sweep("ratio=0,2", "seed=0,1")[0] == 0
    # One that left a checkpoint goes on from it; what another left is no use.
    assert calls() == ["ratio=2,seed=0 cpu True False", "ratio=2,seed=1 cpu False True"]

    # One more value adds its runs, and those of before stay in the table.
    assert sweep("ratio=3,4", "seed=0")[0] == 2  # no longer over the same
    status, out, _ = sweep("ratio=0,3", "seed=0,1")
    assert [line.split()[0] for line in calls()] == ["ratio=3,seed=0", "ratio=3,seed=1"]
    assert [line.split()[1] for line in Path("out/sweep.md").read_text().splitlines()[2:]] == ["0", "3", "2"]


def test_a_finished_run_of_other_settings_is_refused(sweep: Run) -> None:
    assert sweep("seed=0,1")[0] == 0
    status, _, err = sweep("seed=0,1", "ratio=1")
    assert status == 2
    assert "seed=0 is there from a run with other settings" in err


def test_devices_each_take_one_run_at_a_time(sweep: Run) -> None:
    assert sweep("--devices", "cpu:0,cpu:1", "seed=0,1,2,3")[0] == 0
    assert {line.split()[1] for line in calls()} == {"cpu:0", "cpu:1"}
    assert sweep("seed=0,1,2,3")[0] == 0  # where it ran does not matter


def test_a_bar_in_a_value_makes_no_column(sweep: Run) -> None:
    assert sweep("text=a|b,c")[0] == 0
    assert r"| a\|b " in Path("out/sweep.md").read_text()


def test_dry_run_writes_nothing(sweep: Run) -> None:
    status, out, _ = sweep("--dry-run", "seed=0,1")
    assert status == 0
    assert "seed=1 " in out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["seed=1"], "No setting has several values"),
        (["seed=0,0"], "seed has the value 0 twice"),
        (["ratio=1,0,1.0"], "ratio=1 and ratio=1.0 are the same settings"),
        (["seed=0,1", "seed=2"], "seed is given twice"),
        (["seed=2", "seed=0,1"], "seed is given twice"),
        (["seed=0,1", "output_dir=a,b"], "output_dir is given twice"),
        (["seed=0,x"], "seed wants int"),
        (["sead=0,1"], "Did you mean seed"),
        (["seed=0,1", "--jobs", "0"], "--jobs: must be a whole number, at least 1"),
        (["seed=0,1", "--jobs", "x"], "--jobs: must be a whole number, at least 1"),
        (["seed=0,1", "--jobs", "2", "--devices", "cpu"], "give one"),
        (["seed=0,1", "--devices", "cpu,cpu"], "each once"),
        (["seed=0,1", "--devices", "cpu", "device=cpu"], "give one"),
    ],
)
def test_refused_before_anything_runs(sweep: Run, argv: list[str], complaint: str) -> None:
    status, _, err = sweep(*argv)
    assert status == 2
    assert complaint in err
    assert not Path("out").exists()


def test_broken_record_is_refused(sweep: Run) -> None:
    Path("out").mkdir()
    for content in ('{"kdtune_sweep": 2}', "{", "[]", '{"kdtune_sweep": 1, "axes": ["seed"]}'):
        Path("out/sweep.json").write_text(content)
        status, _, err = sweep("seed=0,1")
        assert status == 2
        assert "sweep.json cannot be read" in err


def test_names_of_folders(sweep: Run) -> None:
    paths = ["/models/a b/x", "/models/a_b/x", "../" + "y" * 300]
    assert sweep(f"text={','.join(paths)}", "layers=[0],[0,1]")[0] == 0
    names = list(runs())
    assert len(set(names)) == 6
    assert all(len(name) < 200 and "/" not in name and not name.startswith(".") for name in names)
    assert names[0] == "text=models_a_b_x,layers=0"
    assert {run["values"]["text"] for run in runs().values()} == set(paths)
    assert all((Path("out") / name / "metrics.jsonl").is_file() for name in names)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", ["1"]),
        ("", [""]),
        ("0, 0.5", ["0", "0.5"]),
        ("[0,3]", ["[0,3]"]),
        ("[0],[0,1]", ["[0]", "[0,1]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("'a, b',c", ["'a, b'", "c"]),
        ('"a, ]",c', ['"a, ]"', "c"]),
    ],
)
def test_commas(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_digits_follow_the_spread() -> None:
    assert spread([]) == "-"
    assert spread([2.20934]) == "2.2093"
    assert spread([2.2, 2.21, 2.22]) == "2.210 ± 0.010"
    assert spread([1.0, 1.0]) == "1.0000 ± 0.0000"
    assert spread([100.0, 300.0]) == "200 ± 141"
