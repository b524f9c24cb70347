"""Which folders a report takes, and what it says of those that it does not."""

import json
import math
from pathlib import Path

import pytest

from kdtune.reporting import findings, material, runs, sizes

from .folders import render, write_evaluation, write_model, write_run, write_sweep


def test_what_a_run_left_behind(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", dataset={"source": "a.jsonl", "sources": {}}, lr=[1, 2])
    (run,) = material.read([folder]).runs
    assert (run.name, run.seed, run.last_step, run.is_finished) == ("run", 0, 8, True)
    assert run.settings["dataset.source"] == "a.jsonl"
    assert run.settings["dataset.sources"] == {}
    assert list(run.series["loss"]) == list(range(1, 9))
    assert list(run.series["val_ce_loss"]) == [0, 4, 8]
    assert run.student is not None
    assert run.student.name.endswith("run/model")
    assert (run.student.layers, run.student.width, run.student.heads, run.student.vocab_size) == (2, 4, "2 / 2", 8)
    assert (run.student.parameters, run.student.dtype, run.student.num_bytes) == (32, "bf16", 64)


def test_gaps_cut_lines_and_resumed_steps(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 9.0}, {"step": 3, "loss": 3.0}]
    folder = write_run(tmp_path / "run", lines=lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (run,) = material.read([folder]).runs
    series = run.series["loss"]
    assert [series[1], series[3]] == [1.0, 3.0]
    assert math.isnan(series[2])
    assert list(series) == [1, 2, 3]
    assert any("run (loss at 1 step)" in line for line in findings.warnings(runs.groups([run])))


def test_finetune_and_distillation_share_their_validation(tmp_path: Path) -> None:
    tuned = write_run(tmp_path / "tuned", lines=[{"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 2.5}])
    (run,) = material.read([tuned]).runs
    assert run.last("val_ce_loss") == 2.5


def test_models_of_runs_that_are_not_finished_and_of_caches(tmp_path: Path) -> None:
    base = write_model(tmp_path / "models" / "base")
    card = {"teacher": {"name": "big", "dtype": "bf16"}, "vocab_size": 8, "store": {"kind": "top_k", "top_k": 64}}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "card.json").write_text(json.dumps(card))
    start = {"checkpoint_dir": str(base), "keep_layers": [0]}
    folder = write_run(
        tmp_path / "run", finished=False, checkpointer=start, teacher={"cache_dir": str(tmp_path / "cache")}
    )
    (run,) = material.read([folder]).runs
    assert run.student == sizes.Model("models/base", 1, 4, "2 / 2", 8, note="not written yet")
    assert run.teacher is not None
    assert (run.teacher.name, run.teacher.note.split(": ")[1]) == ("big", "top_k 64")
    assert any("Not finished" in line and "step 8" in line for line in findings.warnings(runs.groups([run])))
    gone = write_run(tmp_path / "gone", teacher_checkpointer={"checkpoint_dir": "no/such/teacher"})
    (run,) = material.read([gone]).runs
    assert run.teacher == sizes.Model("such/teacher", note="its folder is no longer there")


def test_groups_and_their_names(tmp_path: Path) -> None:
    for ratio in (0.0, 0.5):
        for seed in (0, 1):
            write_run(tmp_path / f"{ratio}-{seed}", seed=seed, kd_ratio=ratio)
    write_run(tmp_path / "alone", kd_ratio=1.0)
    read = material.read(sorted(path for path in tmp_path.iterdir())).runs
    groups = runs.groups(read)
    assert [(group.name, [run.name for run in group.runs]) for group in groups] == [
        ("kd_ratio=0", ["0.0-0", "0.0-1"]),
        ("kd_ratio=0.5", ["0.5-0", "0.5-1"]),
        ("alone", ["alone"]),
    ]
    assert [one.key for one in runs.differences(read)] == ["kd_ratio", "seed"]


def test_runs_that_differ_in_nothing_stay_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "ab"]
    groups = runs.groups(material.read(folders).runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("a", 1), ("b", 1)]


def test_a_sweep_is_its_runs(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", {"a": 0.0, "b": 0.1})
    read = material.read([folder, folder / "a-seed0"])
    assert len(read.runs) == 6
    assert [(group.name, len(group.runs)) for group in runs.groups(read.runs)] == [
        ("kd_loss.name=a", 3),
        ("kd_loss.name=b", 3),
    ]
    (folder / "b-seed2" / "metrics.jsonl").unlink()
    read = material.read([folder])
    assert len(read.runs) == 5
    assert read.warnings == ["sweep: 1 of 6 runs have not begun: b-seed2"]
    other = write_sweep(tmp_path / "other", {"a": 0.0})
    names = [group.name for group in runs.groups(material.read([folder, other]).runs)]
    assert names == ["sweep: kd_loss.name=a", "sweep: kd_loss.name=b", "other: kd_loss.name=a"]
    moved = folder.rename(tmp_path / "moved")
    assert len(material.read([moved]).runs) == 5


def refused(*folders: Path) -> str:
    with pytest.raises((ValueError, OSError)) as found:
        render(*folders)
    return str(found.value)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "runs" / "two")
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "is a file. Give the folder" in refused(folder / "metrics.jsonl")
    assert f"Its parent is one: kdtune report {folder}" in refused(folder / "model")
    assert f"There are some in it: kdtune report {tmp_path / 'runs'}/*" in refused(tmp_path / "runs")
    (folder / "metrics.jsonl").rename(folder / "gone")
    assert "the run has not begun" in refused(folder)
    (tmp_path / "empty").mkdir()
    assert "is not a run (metrics.jsonl in it), an evaluation" in refused(tmp_path / "empty")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "has no numbers yet"),
        ('{"step": 1, "lo\n', "metrics.jsonl, line 1 is no JSON"),
        ('{"step": 1, "loss": 1.0}\nnot\n{"step": 2, "loss": 1.0}\n', "metrics.jsonl, line 2 is no JSON"),
        ("[1, 2]\n", 'line 1 is no object with a "step"'),
        ('{"loss": 1.0}\n', 'line 1 is no object with a "step"'),
        ('{"step": 1, "loss": "low"}\n', "has 'low' for 'loss'"),
    ],
)
def test_broken_metrics(tmp_path: Path, line: str, complaint: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(line)
    assert complaint in refused(folder)


def test_broken_settings_sweeps_and_evaluations(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("a: [1\n")
    assert "config.yaml cannot be read" in refused(folder)
    (folder / "config.yaml").write_text("- a\n")
    assert "config.yaml holds list" in refused(folder)
    (folder / "config.yaml").unlink()
    assert "has metrics.jsonl but no config.yaml" in refused(folder)
    sweep = write_sweep(tmp_path / "sweep", {"a": 0.0})
    (sweep / "sweep.json").write_text('{"kdtune_sweep": 2, "runs": []}')
    assert "is of version 2, and this kdtune reads 1" in refused(sweep)
    (sweep / "sweep.json").write_text('{"kdtune_sweep": 1}')
    assert "is not what kdtune sweep writes" in refused(sweep)
    (sweep / "sweep.json").write_text('{"kdtune_sweep": 1, "runs": [{"name": "x", "values": {}}]}')
    assert "none of the 1 runs of this sweep has begun" in refused(sweep)
    evaluation = write_evaluation(tmp_path / "evaluation")
    (evaluation / "evaluation.json").write_text('{"kdtune_evaluation": 2}')
    assert "is of another version of kdtune" in refused(evaluation)
