"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdtune.checkpoint import Run, latest
from kdtune.checkpoint.state import STATE_FILE
from kdtune.distributed import ALONE, Ranks


class Training:
    """A model and its optimizer, of one weight each; the model is written when it may be."""

    ranks = ALONE

    def __init__(self) -> None:
        self.weight, self.moment = torch.zeros(1000, 3), torch.zeros(3)
        self.may_write, self.num_writing, self.most_writing = threading.Event(), 0, 0
        self.failure: Exception | None = None

    def step(self) -> None:
        self.weight += 1
        self.moment += 1

    def trained(self) -> dict[str, Tensor]:
        return {"weight": self.weight.T}

    def write(self, folder: Path, trained: Mapping[str, Tensor], ranks: Ranks) -> None:
        self.num_writing += 1
        self.most_writing = max(self.most_writing, self.num_writing)
        assert self.may_write.wait(60)
        if self.failure is not None:
            raise self.failure
        torch.save(dict(trained), folder / "weights.pt")
        self.num_writing -= 1

    def state_dict(self) -> dict[str, Any]:
        return {"state": {0: {"moment": self.moment}}, "lr": 0.1}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def saved(folder: Path) -> tuple[Tensor, Tensor]:
    """Weight and moment."""
    weight, state = (torch.load(folder / name) for name in ("weights.pt", STATE_FILE))
    assert state["optimizer"]["lr"] == 0.1
    return weight["weight"], state["optimizer"]["state"][0]["moment"]


@pytest.fixture
def training() -> Iterator[Training]:
    training = Training()
    yield training
    training.may_write.set()


@pytest.fixture
def run(training: Training, tmp_path: Path) -> Run:
    return Run(tmp_path, None, training, optimizer=training)


def test_training_goes_on_while_a_copy_is_written(run: Run, training: Training) -> None:
    for run.step in (1, 2):
        training.step()
        training.may_write.clear()
        folder = run.save(in_background=True)
        assert latest(run.output_dir) != folder
        training.step()
        training.may_write.set()
        run.wait()
        assert latest(run.output_dir) == folder
        weight, moment = saved(folder)
        assert torch.equal(weight, torch.full((3, 1000), 2.0 * run.step - 1))
        assert torch.equal(moment, torch.full((3,), 2.0 * run.step - 1))
        assert weight.stride() == training.weight.T.stride()


@pytest.mark.parametrize("in_background", [True, False])
def test_one_is_written_at_a_time(in_background: bool, run: Run, training: Training) -> None:
    run.step = 1
    run.save(in_background=True)
    timer = threading.Timer(0.2, training.may_write.set)
    timer.start()
    run.step = 2
    folder = run.save(in_background)
    assert training.may_write.is_set()
    run.wait()
    assert latest(run.output_dir) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert training.most_writing == 1


def test_a_result_waits_for_a_checkpoint(run: Run, training: Training, tmp_path: Path) -> None:
    run.step = 3
    folder = run.save(in_background=True)
    threading.Timer(0.2, training.may_write.set).start()
    run.finish(lambda aside: (aside / "seen").write_text(str(latest(tmp_path))))
    assert (tmp_path / "model" / "seen").read_text() == str(folder)


def leave(run: Run) -> None:
    with run:
        pass


@pytest.mark.parametrize("then", [Run.save, Run.wait, leave, lambda run: run.finish(lambda folder: None)])
def test_an_error_reaches_training(then: Callable[[Run], Any], run: Run, training: Training) -> None:
    training.may_write.set()
    run.step = 1
    first = run.save()
    training.failure = OSError("no space")
    run.step = 2
    second = run.save(in_background=True)
    with pytest.raises(OSError, match=f"{second} could not be written: no space. The newest checkpoint is {first}."):
        then(run)
    training.failure = None
    assert latest(run.output_dir) == first
    run.wait()
    assert latest(run.save()) is None
    assert latest(run.output_dir) == second


def test_an_error_does_not_hide_that_of_training(run: Run, training: Training) -> None:
    training.failure = OSError("no space")
    run.save(in_background=True)
    training.may_write.set()
    with pytest.warns(UserWarning, match="no space"), pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError


@pytest.mark.parametrize("ended_by", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_ends_finishes_what_is_being_written(
    ended_by: type[BaseException], run: Run, training: Training
) -> None:
    run.step = 1
    folder = run.save(in_background=True)
    threading.Timer(0.2, training.may_write.set).start()
    with pytest.raises(ended_by), run:
        raise ended_by
    assert latest(run.output_dir) == folder


def test_what_is_not_a_number_names_the_newest(run: Run, training: Training) -> None:
    run.step = 1
    folder = run.save(in_background=True)
    threading.Timer(0.2, training.may_write.set).start()
    assert f"The checkpoint {folder} is from before" in str(run.not_finite(2, float("nan"), 1.0))


def test_memory_is_taken_once(run: Run, training: Training) -> None:
    places = set()
    training.may_write.set()
    write = training.write

    def note(folder: Path, trained: Mapping[str, Tensor], ranks: Ranks) -> None:
        places.add(trained["weight"].data_ptr())
        write(folder, trained, ranks)

    training.write = note  # type: ignore[method-assign]
    for run.step in range(3):
        run.save(in_background=True)
    run.wait()
    assert len(places) == 1
    assert training.weight.data_ptr() not in places
