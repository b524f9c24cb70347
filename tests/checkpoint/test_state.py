"""What a run leaves on the disk, whatever happens while it does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdtune import files
from kdtune.checkpoint import Run, check_resume, latest, prepare_output_dir
from kdtune.checkpoint import state as module
from kdtune.checkpoint.state import STATE_FILE, write_aside
from kdtune.distributed import ALONE, Ranks


class Counter:
    """A part of a run."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": torch.arange(self.value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["tensor"], torch.arange(state["value"]))
        self.value = state["value"]


def write_model(folder: Path, weights: str = "weights") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)


class Model:
    """What is trained."""

    ranks = ALONE

    def __init__(self) -> None:
        self.weight = torch.zeros(3)

    def trained(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def write(self, folder: Path, trained: Mapping[str, Tensor], ranks: Ranks) -> None:
        write_model(folder, str(trained["weight"].tolist()))


def open_run(output_dir: Path, counter: Counter | None = None, *, resume: bool = False) -> Run:
    found = prepare_output_dir(output_dir, resume=resume, overwrite=False, sources=())
    return Run(output_dir, found, Model(), counter=counter or Counter())


def save_at(run: Run, step: int, *, in_background: bool = False) -> Path:
    run.step = step
    folder = run.save(in_background)
    run.wait()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_and_resume(tmp_path: Path) -> None:
    counter = Counter()
    run = open_run(tmp_path, counter)
    for step in (2, 4, 10):
        counter.value = 100 * step
        folder = save_at(run, step)
        assert folder == latest(tmp_path) == tmp_path / "checkpoints" / f"step_{step:08d}"
        assert names(folder) == ["config.json", "model.safetensors", STATE_FILE]
        assert names(tmp_path / "checkpoints") == [folder.name], "older ones are deleted"
    counter = Counter()
    run = open_run(tmp_path, counter, resume=True)
    assert (run.step, counter.value) == (10, 1000)


def test_random_state_continues(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    torch.manual_seed(7)
    run.save()
    expected = torch.rand(3)
    torch.manual_seed(8)
    open_run(tmp_path, resume=True)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / STATE_FILE).touch()
    assert latest(tmp_path) == folder


class Crash(BaseException):
    """A process that ends: nothing of it is caught."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The so many-th operation on the disk is the last."""
    left = call

    def counting(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return operation(*args, **kwargs)

        return counted

    monkeypatch.setattr(Path, "rename", counting(Path.rename))
    monkeypatch.setattr(Path, "write_text", counting(Path.write_text))
    monkeypatch.setattr(Path, "mkdir", counting(Path.mkdir))
    monkeypatch.setattr(files, "sync", counting(files.sync))
    monkeypatch.setattr(torch, "save", counting(torch.save))
    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(module.os, name, counting(getattr(module.os, name)))


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("call", range(25))
def test_a_crash_while_saving_keeps_a_complete_checkpoint(
    call: int, in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(11)
    run = open_run(tmp_path, counter)
    save_at(run, 1)
    counter.value = 22
    with monkeypatch.context() as patch:
        crash_at(patch, call)
        try:
            save_at(run, 2, in_background=in_background)
        except Crash:
            completed = False
        else:
            completed = True
    counter = Counter()
    run = open_run(tmp_path, counter, resume=True)
    newest = latest(tmp_path)
    assert newest is not None
    assert names(newest) == ["config.json", "model.safetensors", STATE_FILE]
    assert names(tmp_path / "checkpoints") == [newest.name], "nothing of the crash is left over"
    assert (run.step, counter.value) in [(1, 11), (2, 22)]
    assert (run.step == 2) or not completed
    assert completed == (call >= 17), "the calls cover all of saving"
    save_at(run, 3)
    assert names(tmp_path / "checkpoints") == ["step_00000003"]


def test_an_incomplete_folder_is_no_checkpoint(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    save_at(run, 1)
    shutil.copytree(tmp_path / "checkpoints/step_00000001", tmp_path / "checkpoints/.step_00000002.tmp")
    (tmp_path / "checkpoints/step_00000003").mkdir()  # the rest of a deletion that was cut short
    assert latest(tmp_path) == tmp_path / "checkpoints/step_00000001"


def test_overwriting_a_folder_survives_an_error(tmp_path: Path) -> None:
    write_aside(tmp_path / "model", write_model)

    def fail(folder: Path) -> None:
        write_model(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_aside(tmp_path / "model", fail)
    assert names(tmp_path / "model") == ["config.json", "model.safetensors"]
    write_aside(tmp_path / "model", lambda folder: (folder / "new").touch())
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


# Which runs may start where.


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    for name in ("checkpoints", "model"):
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        (folder / "versions.json").touch()
        with pytest.raises(
            FileExistsError, match=f"already holds a run \\({name}, ver.*resume_from_checkpoint=true.*an"
        ):
            prepare_output_dir(folder, resume=False, overwrite=False, sources=())


def test_what_cannot_be_resumed_is_not_offered(tmp_path: Path) -> None:
    open_run(tmp_path)
    for resume, offered in ((False, True), (None, False)):
        with pytest.raises(FileExistsError, match="choose another output_dir") as caught:
            prepare_output_dir(tmp_path, resume=resume, overwrite=False, sources=())
        assert ("resume_from_checkpoint" in str(caught.value)) is offered


@pytest.mark.parametrize("name", ["checkpoints", "model", "metrics.jsonl", "config.yaml", "recipe.py"])
@pytest.mark.parametrize(("resume", "overwrite"), [(False, True), (True, False), (False, False)])
def test_what_no_run_wrote_is_never_replaced(name: str, resume: bool, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds {name}, and no run of kdtune wrote that"):
        prepare_output_dir(tmp_path, resume=resume, overwrite=overwrite, sources=())


def test_other_files_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for resume in (False, True):
        assert prepare_output_dir(tmp_path, resume=resume, overwrite=False, sources=()) is None
        assert prepare_output_dir(tmp_path / "new", resume=resume, overwrite=False, sources=()) is None


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    save_at(run, 1)
    run.finish(write_model)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other/model").mkdir(parents=True)
    assert prepare_output_dir(tmp_path, resume=False, overwrite=True, sources=()) is None
    held = ["checkpoints", "metrics.jsonl", "model", "notes.txt", "other", "versions.json"]
    assert names(tmp_path) == held, "a check deletes nothing"
    Run(tmp_path, None, Model())
    assert names(tmp_path) == ["notes.txt", "other", "versions.json"]
    assert (tmp_path / "other/model").is_dir()


def test_no_checkpoint_stays_older_than_the_finished_model(tmp_path: Path) -> None:
    """It would be resumed, and its shorter run would replace the model."""
    save_at(open_run(tmp_path), 1)
    run = open_run(tmp_path, resume=True)
    run.step = 5
    run.finish(write_model)
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.name == "step_00000005"


def test_a_run_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    loader = Counter()
    run = Run(tmp_path, None, Model(), loader=loader)
    run.step = 5
    folder = run.save()
    assert check_resume(folder, loader, num_steps=5) == 5
    assert check_resume(None, loader, num_steps=5) == 0
    with pytest.raises(ValueError, match=r"after step 5, and this run ends after step 4.*raise max_steps"):
        check_resume(folder, loader, num_steps=4)


def test_resuming_goes_before_overwriting(tmp_path: Path) -> None:
    """A config that overwrites by default is resumed by adding resume_from_checkpoint=true, and nothing else."""
    folder = save_at(open_run(tmp_path), 3)
    assert prepare_output_dir(tmp_path, resume=True, overwrite=True, sources=()) == folder


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_finished_model_without_checkpoint_is_not_resumed(overwrite: bool, tmp_path: Path) -> None:
    open_run(tmp_path).finish(write_model)
    with pytest.raises(FileExistsError, match=r"finished model and no checkpoint.*checkpointer.checkpoint_dir=.*model"):
        prepare_output_dir(tmp_path, resume=True, overwrite=overwrite, sources=())


@pytest.mark.parametrize("source", ["model", "checkpoints/step_00000001", "elsewhere/../model"])
def test_what_a_run_starts_from_is_not_deleted(source: str, tmp_path: Path) -> None:
    open_run(tmp_path).finish(write_model)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="is part of the run in output_dir"):
        prepare_output_dir(tmp_path, resume=False, overwrite=True, sources=["teacher", str(tmp_path / source)])
    beside = [str(tmp_path.parent), str(tmp_path / "models")]
    assert prepare_output_dir(tmp_path, resume=False, overwrite=True, sources=beside) is None


def test_a_file_is_no_output_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(NotADirectoryError, match=f"output_dir {path} cannot be made: .*file is a file"):
            prepare_output_dir(path, resume=False, overwrite=False, sources=())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip file at all"])
def test_damaged_state(content: bytes, tmp_path: Path) -> None:
    folder = save_at(open_run(tmp_path), 3)
    (folder / STATE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{STATE_FILE} cannot be read .*Delete .*step_00000003"):
        open_run(tmp_path, resume=True)


def test_state_cannot_run_code(tmp_path: Path) -> None:
    folder = save_at(open_run(tmp_path), 3)
    torch.save({"counter": Crash}, folder / STATE_FILE)
    with pytest.raises(ValueError, match="cannot be read"):
        open_run(tmp_path, resume=True)


# What reproduces a run.


def test_record(tmp_path: Path) -> None:
    recipe = tmp_path / "my_recipe.py"
    recipe.write_text("# mine")
    output_dir = tmp_path / "a" / "b"
    run = open_run(output_dir)
    run.record("seed: 1\n", recipe)
    assert names(output_dir) == ["config.yaml", "recipe.py", "versions.json"]
    assert (output_dir / "config.yaml").read_text() == "seed: 1\n"
    assert (output_dir / "recipe.py").read_text() == "# mine"
    versions = json.loads((output_dir / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"kdtune", "torch", "python"}


def test_the_recorded_recipe_can_itself_be_run_there(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    (tmp_path / "recipe.py").write_text("# mine")
    run.record("seed: 1\n", tmp_path / "recipe.py")
    assert (tmp_path / "recipe.py").read_text() == "# mine"


@pytest.mark.parametrize("saved", [True, False])
def test_a_loss_that_is_no_number(saved: bool, tmp_path: Path) -> None:
    run = open_run(tmp_path)
    if saved:
        save_at(run, 3)
    error = run.not_finite(5, float("nan"), math.inf)
    assert isinstance(error, FloatingPointError)
    assert "loss of step 5 is nan, the norm of its gradient inf" in str(error)
    assert ("step_00000003 is from before" if saved else "No checkpoint was saved before") in str(error)
