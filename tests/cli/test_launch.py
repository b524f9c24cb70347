"""Several processes: what is said, how failures and signals end them, and how they start again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from tiny_runs import arguments, numbers, write_model, write_rows

import kdtune as package
from kdtune import checkpoint
from kdtune.cli import launch
from kdtune.teacher_cache import TeacherCache

from .conftest import Run

# Ranks without torch are there in a tenth of the time.
RECIPE = '''"""Do what a test wants."""

import os, signal, sys, time, warnings
from dataclasses import dataclass

from kdtune.config import setting
from kdtune.interrupt import Interrupt

if "RANK" in os.environ:
    @dataclass
    class ParallelConfig: ...
else:
    from kdtune.distributed import ParallelConfig


@dataclass
class Config:
    parallel: ParallelConfig = setting(ParallelConfig)  # how


def check(cfg): ...


def main(cfg):
    rank, start = int(os.environ.get("RANK", 0)), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    print(f"hello from {rank}", flush=True)
    os.system("echo from below")
    open(f"{rank}_{start}", "w").close()
    while not all(os.path.exists(f"{one}_{start}") for one in (0, 1)):
        time.sleep(0.01)
'''


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """`processes("the end of main", "--max-restarts=1")`: two that run it."""
    for name in ("OMP_NUM_THREADS", "KDTUNE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)

    def start(code: str, *options: str) -> subprocess.Popen[str]:
        indented = "".join(f"    {line}\n" for line in code.splitlines())
        (tmp_path / "mine.py").write_text(RECIPE + indented)
        return begin("run", "--nproc-per-node", "2", *options, "mine.py", cwd=tmp_path)

    return start


def begin(*argv: str, program: str = "kdtune", **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    command = [sys.executable, "-m", program, *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# In this process.


def test_options_are_torchruns(capsys: pytest.CaptureFixture[str]) -> None:
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--help"])
    known = capsys.readouterr().out
    assert [name for name, *_ in launch.OPTIONS if f"--{name} " not in known] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nproc-per-node", "0"], "invalid number value: '0'"),
        (["--nproc_per_node=two2"], "invalid number value: 'two2'"),
        (["--max-restarts", "-1"], "invalid number value: '-1'"),
        (["--nnodes", "2"], "--nnodes=2 without --nproc-per-node"),
        (["--nproc-per-nodes", "2"], "Did you mean --nproc-per-node?"),
        (["--nproc-per-node", "2", "batch_sise=3"], "Did you mean batch_size"),
    ],
)
def test_mistakes_are_found_before_processes_start(
    options: list[str], said: str, shipped: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kdtune.launching", None)
    status, out, err = kdtune("run", "distil", "--config", "tiny", *options)
    assert (status, out) == (2, "")
    assert said in err


def test_one_of_several_starts_no_others(shipped: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = kdtune("run", "--nproc-per-node", "2", "distil", "--config", "tiny")
    assert (status, "number 1 of 2" in err) == (2, True)


MISTAKE = {"status": 2, "is_consequence": False}
LOST = {"status": 1, "is_consequence": True}


@pytest.mark.parametrize(
    ("ends", "status", "text"),
    [
        ({0: (2, MISTAKE, "no file"), 1: (2, MISTAKE, "no file")}, 2, "no file"),
        ({0: (2, MISTAKE, "later"), 1: (2, MISTAKE, "no file")}, 2, "rank 1: no file"),
        ({0: (1, LOST, "gone"), 1: (2, MISTAKE, "no file")}, 2, "rank 1: no file"),
        ({0: (1, LOST, "gone"), 1: (-9, None, "")}, 137, "rank 1 was killed by SIGKILL, as the system"),
        ({0: (1, LOST, "gone"), 1: (-11, None, "")}, 139, "rank 1 was killed by SIGSEGV."),
        ({1: (7, None, "")}, 7, "rank 1 ended with exit status 7."),
        ({0: (1, LOST, "gone")}, 1, "rank 0 lost a process of another machine, whose launcher says why. (gone)"),
    ],
)
def test_the_cause_among_what_follows_from_it(
    ends: dict[int, tuple[int, dict[str, Any] | None, str]], status: int, text: str, tmp_path: Path
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from kdtune.launching import _find_cause

    failures = {}
    for rank, (code, report, message) in ends.items():
        path = tmp_path / f"{rank}.json"
        if report is not None:
            told = {"message": message, "extraInfo": {"py_callstack": "Traceback", "timestamp": "1"}}
            path.write_text(json.dumps({"message": told, "time": -rank, **report}))
        failures[rank] = ProcessFailure(local_rank=rank, pid=rank, exitcode=code, error_file=str(path))
    cause = _find_cause(failures, 2, has_others=True)
    assert cause.status == status
    assert cause.text.startswith(text)
    assert (cause.is_mistake, cause.traceback) == (status == 2, "")


# Two processes.


def test_one_that_fails_ends_all(processes: Callable[..., subprocess.Popen[str]]) -> None:
    code = 'warnings.warn("of all")\nif rank == 1: raise ValueError("row 7 is empty")\ntime.sleep(60)'
    since = time.monotonic()
    status, out, err = finish(processes(code))
    assert (status, out) == (2, "hello from 0\nfrom below\n")
    assert err == "warning: of all\nkdtune: error: rank 1: row 7 is empty\n"
    assert time.monotonic() - since < 50


def test_they_start_again(processes: Callable[..., subprocess.Popen[str]]) -> None:
    code = 'if rank == 1 and start == "0": os.kill(os.getpid(), signal.SIGKILL)\nprint("start", start)'
    status, out, err = finish(processes(code, "--max-restarts=1"))
    assert (status, out) == (0, "hello from 0\nfrom below\nstart 0\nhello from 0\nfrom below\nstart 1\n")
    assert re.fullmatch(r"kdtune: rank 1 was killed by SIGKILL.*\nkdtune: restart 1 of 1\n", err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ('raise ValueError("no file")', 2, "kdtune: error: no file\n"),
        (
            'if rank == 0: raise KeyError("x")\ntime.sleep(60)',
            1,
            "kdtune: error: rank 0: KeyError: 'x'\nTraceback (most",
        ),
        ("if rank == 1: os._exit(7)\ntime.sleep(60)", 7, "kdtune: error: rank 1 ended with exit status 7.\n"),
        ("if rank == 1: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(60)", 139, "kdtune: error: rank 1 was killed"),
        (
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: os._exit(7)\ntime.sleep(60)",
            7,
            "kdtune: error: rank 1",
        ),
    ],
)
def test_failures(code: str, status: int, said: str, processes: Callable[..., subprocess.Popen[str]]) -> None:
    since = time.monotonic()
    found, _, err = finish(processes(code, "--max-restarts=1") if status == 2 else processes(code))
    assert found == status
    assert err.startswith(said)
    assert err.count("Traceback") == (status == 1)
    assert time.monotonic() - since < 50


TRAIN = """
with Interrupt() as interrupt:
    print("training", flush=True)
    while not interrupt.has_come():
        time.sleep(0.01)
    time.sleep(rank)
    print("saved", flush=True)
    raise SystemExit(interrupt.exit_code)
"""
LOAD = """
print("loading", flush=True)
time.sleep(60)
"""
INTERRUPTED = "\nkdtune: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "signals", "status", "out", "err"),
    [
        (TRAIN, [signal.SIGTERM], 143, "saved\n", ""),
        (TRAIN, [signal.SIGTERM, signal.SIGTERM], 143, "saved\n", ""),
        (TRAIN, [signal.SIGINT], 130, "saved\n", ""),
        (TRAIN.replace("sleep(rank)", "sleep(60)"), [signal.SIGINT, signal.SIGINT], 130, "", INTERRUPTED),
        (LOAD, [signal.SIGTERM], 143, "", ""),
        (LOAD, [signal.SIGINT], 130, "", INTERRUPTED),
    ],
)
def test_signals(
    code: str, signals: list[int], status: int, out: str, err: str, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    process = processes(code, "--max-restarts=1")
    assert process.stdout is not None
    ranks = []
    for line in process.stdout:
        if line in ("training\n", "loading\n"):
            ranks = psutil.Process(process.pid).children()
            break
    time.sleep(0.5)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    assert finish(process) == (status, out, err)
    assert len(ranks) == 2
    assert not psutil.wait_procs(ranks, timeout=5)[1]


@pytest.mark.slow
def test_plain_torchrun(processes: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code = 'warnings.warn("of all")\nif rank == 1: raise ValueError("row 7 is empty")\ntime.sleep(60)'
    processes(code).kill()  # for its file
    argv = ["--nproc-per-node=2", "-m", "kdtune", "run", "mine.py"]
    status, out, err = finish(begin(*argv, program="torch.distributed.run", cwd=tmp_path))
    assert status == 1
    assert out == "hello from 0\nfrom below\n"
    assert err.count("kdtune: error: rank 1: row 7 is empty\n") == err.count("warning: of all\n") == 1


# Two processes that train.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "student", seed=1)
    write_model(folder / "teacher", seed=2)
    write_rows(folder / "rows.jsonl")
    return folder


def train(tiny: Path, output_dir: Path, *overrides: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = arguments(tiny, output_dir, *overrides, recipe="knowledge_distillation")
    return begin(command[0], "--nproc-per-node=2", *options, *command[1:])


@pytest.mark.slow
def test_settings_that_do_not_go_with_the_number(tiny: Path, tmp_path: Path) -> None:
    status, out, err = finish(train(tiny, tmp_path / "run", "parallel.data_shard=3"))
    assert (status, out) == (2, "")
    assert "3, and there are 2 processes" in err
    assert "rank" not in err


@pytest.mark.slow
def test_dry_run_says_how_work_is_shared(tiny: Path, tmp_path: Path) -> None:
    status, out, err = finish(train(tiny, tmp_path / "run", "--dry-run"))
    assert (status, err) == (0, "")
    assert out.count("2 processes (data_shard 2)") == 1
    assert "nothing was trained" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_not_a_number_on_one_rank_stops_all(tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    text = (Path(package.__file__).parents[1] / "recipes" / "knowledge_distillation.py").read_text()
    spoiled = "throughput.add(num_tokens)\n            sums[0] += math.nan if ranks.rank == 1 and step == 3 else 0"
    recipe.write_text(text.replace("throughput.add(num_tokens)", spoiled))
    command = arguments(tiny, tmp_path / "run", recipe="knowledge_distillation")
    status, _, err = finish(begin("run", "--nproc-per-node=2", str(recipe), *command[2:]))
    assert status == 2
    assert re.fullmatch(r"kdtune: error: The loss of step 3 is nan, [^\n]*\n", err)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tiny: Path, tmp_path: Path) -> None:
    """Of any rank at any moment: of its start, of a step, of a checkpoint."""
    settings = ["epochs=120", "save_every_n_steps=1"]
    killed = train(tiny, tmp_path / "killed", *settings, "overwrite_output_dir=true", options=("--max-restarts=20",))
    rng = random.Random(0)
    for _ in range(20):
        ranks = wait_for_ranks(killed)
        if num_steps := rng.randrange(8):
            wait_for_step(tmp_path / "killed", killed, newest_step(tmp_path / "killed") + num_steps)
        time.sleep(rng.uniform(0, 0.3 if num_steps else 8))
        rng.choice(ranks).kill()
        psutil.wait_procs(ranks, timeout=30)
    status, _, err = finish(killed)
    assert err.count("was killed by SIGKILL") == 20, err
    assert status == 0
    steady = train(tiny, tmp_path / "steady", *settings)
    assert finish(steady)[0] == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "steady")
    one, other = (
        checkpoint.load_model(tmp_path / name / "model", dtype=torch.float32, device="cpu").state_dict()
        for name in ("killed", "steady")
    )
    assert all(torch.equal(one[name], weight) for name, weight in other.items())


@pytest.fixture
def asking(tiny: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`asking("what is done when an answer is kept")`: two processes that ask a teacher, with a shard for each."""

    def start(code: str) -> subprocess.Popen[str]:
        text = (Path(package.__file__).parents[1] / "recipes" / "cache_teacher_logits.py").read_text()
        for old, new in (
            ("cfg.output_dir, inputs.card)", "cfg.output_dir, inputs.card, shard_bytes=1)"),
            ("writer.add(example, answers)", f"writer.add(example, answers); {code}"),
            ("import dataclasses", "import dataclasses, time"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "mine.py").write_text(text)
        settings = [f"teacher_checkpointer.checkpoint_dir={tiny / 'teacher'}", "batch_size=2", "store.num_samples=8"]
        settings += [f"dataset.source={tmp_path / 'rows.jsonl'}", "dataset.format=completion", "device=cpu"]
        settings += [f"output_dir={tmp_path / 'cache'}", "dtype=fp32", "tokenizer.max_seq_len=64"]
        return begin("run", "--nproc-per-node=2", str(tmp_path / "mine.py"), *settings)

    write_rows(tmp_path / "rows.jsonl", 120)
    return start


@pytest.mark.slow
def test_twenty_kills_lose_no_answer(asking: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Of either process or of all at any moment, until it is finished."""
    rng, kept = random.Random(0), set[int]()
    for _ in range(20):
        process = asking("time.sleep(0.02)")
        ranks = wait_for_ranks(process)
        num_shards = len(kept) + rng.randrange(8)
        if rng.random() < 0.8:
            while len(list(tmp_path.glob("cache/shards/[!.]*"))) < num_shards and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 8))
        for one in rng.choice(([process, *ranks], ranks[:1], ranks[1:])):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(ranks, timeout=30)
        status, _, err = finish(process)
        assert status in (-signal.SIGKILL, 128 + signal.SIGKILL), err
        if (tmp_path / "cache" / "card.json").exists():
            now = set(TeacherCache(tmp_path / "cache").ids.tolist())
            assert kept <= now
            kept = now
    assert 20 < len(kept) < 120
    status, out, err = finish(asking("None"))
    assert (status, err) == (0, "")
    assert f"{120 - len(kept)} examples to ask about" in out
    shards = (tmp_path / "cache" / "shards").glob("[!.]*")
    written = [id for shard in shards for id in safe_open(shard, "np").get_tensor("ids").tolist()]
    assert len(written) == len(set(written)) == 120
    assert "Nothing is missing." in finish(asking("None"))[1]


@pytest.mark.slow
def test_what_was_answered_before_a_rank_failed_is_kept(
    asking: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    code = 'int(writer.num_examples == 3 and __import__("os").environ["RANK"] == "1" and "row 7 is empty")'
    status, _, err = finish(asking(code))
    assert (status, err) == (2, "kdtune: error: rank 1: invalid literal for int() with base 10: 'row 7 is empty'\n")
    # It is noticed one batch later, which the other process may have written by then.
    assert len(TeacherCache(tmp_path / "cache")) - 3 in (4, 6)
    assert finish(asking("None"))[0] == 0
    assert len(TeacherCache(tmp_path / "cache")) == 120


def newest_step(output_dir: Path) -> int:
    newest = checkpoint.latest(output_dir)
    return int(newest.name.removeprefix("step_")) if newest else 0


def wait_for_step(output_dir: Path, process: subprocess.Popen[str], step: int) -> None:
    for _ in range(6000):
        assert process.poll() is None, process.communicate()
        if newest_step(output_dir) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}")


def wait_for_ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    for _ in range(600):
        assert process.poll() is None, process.communicate()
        ranks = psutil.Process(process.pid).children()
        if len(ranks) == 2:
            return ranks
        time.sleep(0.05)
    raise AssertionError("no ranks")


def start_two_launchers(*command: str) -> list[subprocess.Popen[str]]:
    """As on two machines, with a process each."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    meet = ["--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-backend=c10d"]
    return [begin("run", *meet, "--rdzv-id=7", "--local-addr=127.0.0.1", *command) for _ in range(2)]


@pytest.mark.slow
def test_two_machines(tiny: Path, tmp_path: Path) -> None:
    """They take the steps of two processes on one."""
    nodes = start_two_launchers(*arguments(tiny, tmp_path / "apart", recipe="knowledge_distillation")[1:])
    ended = [finish(node) for node in nodes]
    assert [(status, err) for status, _, err in ended] == [(0, "")] * 2
    assert sorted("The student is in" in out for _, out, _ in ended) == [False, True]
    assert finish(train(tiny, tmp_path / "together"))[0] == 0
    assert numbers(tmp_path / "apart") == numbers(tmp_path / "together")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_machine_of_two_ends_both(number: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    """Told to stop, or one of its processes killed."""
    settings = ("epochs=60", "save_every_n_steps=1")
    nodes = start_two_launchers(*arguments(tiny, tmp_path / "run", *settings, recipe="knowledge_distillation")[1:])
    wait_for_step(tmp_path / "run", nodes[1], 3)
    (rank,) = psutil.Process(nodes[1].pid).children()
    (nodes[1] if number == signal.SIGTERM else rank).send_signal(number)
    ended = [finish(node) for node in nodes]
    if number == signal.SIGTERM:
        assert [(status, err) for status, _, err in ended] == [(143, "")] * 2
        assert sum("SIGTERM: saved" in out for _, out, _ in ended) == 1
    else:
        assert [status for status, _, _ in ended] == [1, 137]
        assert re.match(r"kdtune: error: rank \d lost a process of another machine, whose launcher", ended[0][2])
        assert re.match(r"kdtune: error: rank \d was killed by SIGKILL", ended[1][2])
        assert "\n" not in ended[0][2].rstrip("\n")
    assert newest_step(tmp_path / "run") >= 3


@pytest.mark.slow
def test_the_other_machine_does_not_come(tiny: Path, tmp_path: Path) -> None:
    command = arguments(tiny, tmp_path / "run", recipe="knowledge_distillation")[1:]
    meet = ["--nproc-per-node=1", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29871"]
    status, out, err = finish(begin("run", *meet, "--rdzv-id=7", "--rdzv-conf=join_timeout=2", *command))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"kdtune: error: The launchers of 2 machines did not meet at 127.0.0.1:29871[^\n]*\n", err)
