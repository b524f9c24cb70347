"""A run that was stopped and resumed is the run that never stopped, bit for bit, wherever and however it stopped."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import distil, finetune

from kdtune import data, files
from kdtune.checkpoint import state

ROOT = Path(__file__).parents[2]
LAST_STEP = 9
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def settings(tiny: Path) -> list[str]:
    """Three epochs of three steps (the last step of each is smaller); validation, and a checkpoint at the end."""
    return [
        *tiny_runs.validated_on(tiny),
        "run_val_every_n_steps=2",
        "save_every_n_steps=100",
        "kd_ratio=0.4",
        "kd_loss.temperature=2",
    ]


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = distil(tiny, tmp_path_factory.mktemp("uninterrupted") / "run", *settings(tiny))
    learning_rates = [line["lr"] for line in tiny_runs.steps(run)]
    assert len(learning_rates) == LAST_STEP
    assert learning_rates.index(max(learning_rates)) == 4, "warm-up and cosine both have steps"
    assert [line["num_tokens"] for line in tiny_runs.steps(run)][2] < 60, "the last step of an epoch has two rows"
    return run


def assert_same_state(one: Path, other: Path) -> None:
    """Also what a later resume would start from: moments, schedule, place in the data."""
    folders = [state.latest(run) for run in (one, other)]
    assert all(folder is not None and folder.name == f"step_{LAST_STEP:08d}" for folder in folders)
    first, second = (torch.load(folder / state.STATE_FILE) for folder in folders if folder is not None)
    # That of the process, which no recipe reads; of the runs compared here some share one.
    del first["random"], second["random"]
    assert_equal(first, second)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for item, other_item in zip(one, other, strict=True):
            assert_equal(item, other_item)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture
def during_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """`during_step(n, act)`: act in the n-th step from now, once its rows are chosen; None of it afterwards."""
    next_step = data.Loader.next_step
    waiting: list[tuple[int, Callable[[], None]]] = []
    count = 0

    def acting(loader: data.Loader) -> list[data.Batch]:
        nonlocal count
        count += 1
        micro_batches = next_step(loader)
        if waiting and waiting[0][0] == count:
            waiting.pop()[1]()
        return micro_batches

    def arm(n: int, act: Callable[[], None]) -> None:
        nonlocal count
        count = 0
        waiting[:] = [(n, act)]

    monkeypatch.setattr(data.Loader, "next_step", acting)
    return arm


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("stop", range(1, LAST_STEP))
def test_stopped_by_a_signal_at_any_step(
    stop: int,
    tiny: Path,
    uninterrupted: Path,
    tmp_path: Path,
    during_step: Callable[[int, Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    number = signal.SIGTERM if stop % 2 else signal.SIGINT
    during_step(stop, send(number))
    with pytest.raises(SystemExit) as end:
        distil(tiny, tmp_path, *settings(tiny))
    assert end.value.code == EXIT_CODES[number]
    folder = tmp_path / "checkpoints" / f"step_{stop:08d}"
    said = f"{number.name}: saved {folder}; continue with resume_from_checkpoint=true"
    assert said in capsys.readouterr().out.splitlines()
    assert [line["step"] for line in tiny_runs.steps(tmp_path)] == list(range(1, stop + 1)), "the step was finished"
    assert not (tmp_path / "model").exists()

    distil(tiny, tmp_path, *settings(tiny), "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(uninterrupted, tmp_path)
    assert_same_state(uninterrupted, tmp_path)


def test_a_signal_in_the_last_step_lets_the_run_finish(
    tiny: Path, uninterrupted: Path, tmp_path: Path, during_step: Callable[[int, Callable[[], None]], None]
) -> None:
    during_step(LAST_STEP, send(signal.SIGTERM))
    distil(tiny, tmp_path, *settings(tiny))
    tiny_runs.assert_same_run(uninterrupted, tmp_path)


def test_stopped_again_and_again(
    tiny: Path, uninterrupted: Path, tmp_path: Path, during_step: Callable[[int, Callable[[], None]], None]
) -> None:
    saving = ["save_every_n_steps=1", "save_in_background=true"]
    for steps in (2, 1, 3):
        during_step(steps, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            distil(tiny, tmp_path, *settings(tiny), "resume_from_checkpoint=true", *saving)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1, "nothing is half done"
        saving = []
    distil(tiny, tmp_path, *settings(tiny), "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(uninterrupted, tmp_path)
    assert_same_state(uninterrupted, tmp_path)


@pytest.mark.parametrize("overrides", [[], ["dtype=bf16", "optimizer.name=adamw_8bit"], ["lora.rank=2"]])
def test_checkpoints_written_in_the_background_are_the_same(
    overrides: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, though steps are taken while they are written."""
    monkeypatch.setattr(state, "_delete_others", lambda newest: None)
    monkeypatch.setattr(files, "sync", lambda path: time.sleep(0.01))  # of a slow disk
    waiting, background = (
        distil(tiny, tmp_path / name, "save_every_n_steps=3", *overrides, f"save_in_background={flag}")
        for name, flag in (("waiting", "false"), ("background", "true"))
    )
    for folder in (waiting / "checkpoints", waiting / "model", waiting / "adapter"):
        written = {path.relative_to(waiting): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert {path: (background / path).read_bytes() for path in written} == written
    assert len(list((background / "checkpoints").iterdir())) == 3
    assert tiny_runs.numbers(waiting) == tiny_runs.numbers(background)


@pytest.mark.parametrize("flag", ["false", "true"])
def test_a_full_disk(
    flag: str,
    tiny: Path,
    tmp_path: Path,
    uninterrupted: Path,
    during_step: Callable[[int, Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It ends the run with one message. The checkpoint before stays, and the run can be continued."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = tmp_path / "checkpoints" / "step_00000004"

    def fill() -> None:
        while state.latest(tmp_path) != kept:
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    during_step(6, fill)
    saving = ["save_every_n_steps=2", f"save_in_background={flag}"]
    try:
        with pytest.raises(SystemExit) as end:
            distil(tiny, tmp_path, *settings(tiny), *saving)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert end.value.code == 2
    said = rf"kdtune: error: .*step_00000006 could not be written: .*File too large.* is {kept}\."
    assert re.fullmatch(said, capsys.readouterr().err.strip())
    assert state.latest(tmp_path) == kept
    distil(tiny, tmp_path, *settings(tiny), "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(uninterrupted, tmp_path)


class Crash(BaseException):
    """Passes every `except Exception`."""


def crash() -> None:
    raise Crash


@pytest.mark.parametrize(("every", "stop"), [(1, 6), (2, 4), (4, 8)])
def test_crashed_in_a_step(
    every: int,
    stop: int,
    tiny: Path,
    uninterrupted: Path,
    tmp_path: Path,
    during_step: Callable[[int, Callable[[], None]], None],
) -> None:
    saving = f"save_every_n_steps={every}"
    during_step(stop, crash)
    with pytest.raises(Crash):
        distil(tiny, tmp_path, *settings(tiny), saving)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the machine went down in the middle of a line
    distil(tiny, tmp_path, *settings(tiny), saving, "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(uninterrupted, tmp_path)
    assert_same_state(uninterrupted, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{LAST_STEP:08d}"]


def test_fine_tuning_resumes_too(
    tiny: Path, tmp_path: Path, during_step: Callable[[int, Callable[[], None]], None]
) -> None:
    overrides = [*tiny_runs.validated_on(tiny), "run_val_every_n_steps=3", "shuffle=false", "dtype=bf16"]
    whole = finetune(tiny, tmp_path / "whole", *overrides)
    resumed = tmp_path / "resumed"
    during_step(5, send(signal.SIGTERM))
    with pytest.raises(SystemExit):
        finetune(tiny, resumed, *overrides)
    finetune(tiny, resumed, *overrides, "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(whole, resumed)


def test_rounding_in_training_resumes_too(
    tiny: Path, tmp_path: Path, during_step: Callable[[int, Callable[[], None]], None]
) -> None:
    overrides = ["qat.group_size=16", "qat.activations=int8"]
    whole = distil(tiny, tmp_path / "whole", *overrides)
    resumed = tmp_path / "resumed"
    during_step(5, send(signal.SIGTERM))
    with pytest.raises(SystemExit):
        distil(tiny, resumed, *overrides)
    distil(tiny, resumed, *overrides, "resume_from_checkpoint=true")
    tiny_runs.assert_same_run(whole, resumed)


# kill -9: no handler, no finally, no flush. The processes are forks of one that has imported torch.

KILLED = """
import os, random, signal, sys, threading, time
from pathlib import Path

import torch
import tqdm
from kdtune.checkpoint import latest
from kdtune.cli import main

torch.set_num_threads(1)  # there must be no threads where it forks
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())  # its own is one for all processes: who is killed with it leaves it locked


def run(argv, kill_at=None, seconds=None):
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        if kill_at is not None:
            count_down(kill_at)
        try:
            main.main(argv)
        finally:
            sys.stdout.flush()
            os._exit(1 if sys.exc_info()[0] else 0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_down(left):
    # Dies before the so many-th operation by which a checkpoint gets to the disk or from it.
    def counting(operation):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return counted

    Path.rename = counting(Path.rename)
    os.fsync, os.unlink, os.rmdir = (counting(operation) for operation in (os.fsync, os.unlink, os.rmdir))
    torch.save = counting(torch.save)


def newest():
    folder = latest(output_dir)
    return folder.name if folder else ""


output_dir, argv = Path(sys.argv[2]), sys.argv[3:]
main.main([*argv, "output_dir=warm_up", "max_steps=1"])  # what is imported late is there before the forks
if sys.argv[1] == "operations":
    # Some 20 operations belong to a checkpoint: each kind of them is hit in the course of the run.
    for kill_at in (3, 14, 25, 34, 43):
        before, code = newest(), run(argv, kill_at=kill_at)
        assert code == -signal.SIGKILL, code
        assert newest() >= before, "no way is lost"
else:
    generator = random.Random(0)
    for _ in range(int(sys.argv[1])):
        before, code = newest(), run(argv, seconds=generator.uniform(0.05, 0.6))
        assert code in (0, -signal.SIGKILL), code
        assert newest() >= before, "no way is lost"
assert run(argv) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    ("kills", "in_background"),
    [
        pytest.param("operations", "true", marks=pytest.mark.slow),
        ("5", "false"),
        pytest.param("operations", "false", marks=pytest.mark.slow),
        pytest.param("60", "false", marks=pytest.mark.slow),
        pytest.param("60", "true", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(kills: str, in_background: str, tiny: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = tiny_runs.arguments(
        tiny,
        run,
        *settings(tiny),
        "save_every_n_steps=1",
        f"save_in_background={in_background}",
        "resume_from_checkpoint=true",
        recipe="knowledge_distillation",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, kills, str(run), *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tiny_runs.assert_same_run(uninterrupted, run)
    assert_same_state(uninterrupted, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{LAST_STEP:08d}"], "nothing is left over"
