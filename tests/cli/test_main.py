"""What holds for every command: help, version, mistakes, interruption, speed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kdtune as package
from kdtune.cli import main as launcher

from .conftest import Run


def test_help(kdtune: Run) -> None:
    for argv in (["--help"], ["-h"], ["help"]):
        status, out, err = kdtune(*argv)
        assert (status, err) == (0, "")
        assert all(f"  {command}" in out for command in launcher.COMMANDS)


def test_no_command_shows_the_help_and_fails(kdtune: Run) -> None:
    status, out, err = kdtune()
    assert (status, out) == (2, "")
    assert "usage: kdtune" in err


@pytest.mark.parametrize("command", launcher.COMMANDS)
def test_help_of_each_command(command: str, kdtune: Run) -> None:
    status, out, _ = kdtune(command, "--help")
    assert status == 0
    assert out.startswith(f"usage: kdtune {command}")


def test_version(kdtune: Run) -> None:
    assert kdtune("--version") == (0, f"kdtune {package.__version__}\n", "")


def test_unknown_command(kdtune: Run) -> None:
    assert kdtune("rum") == (2, "", "kdtune: error: No command 'rum'. Did you mean run?\n")


def test_unknown_option(kdtune: Run) -> None:
    status, _, err = kdtune("ls", "--nope")
    assert status == 2
    assert "unrecognized arguments: --nope" in err


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FloatingPointError])
def test_traceback_on_request(
    error: type[Exception], kdtune: Run, monkeypatch: pytest.MonkeyPatch, shipped: Path
) -> None:
    (shipped / "distil.py").write_text(f"raise {error.__name__}('this and that')")
    assert kdtune("run", "distil") == (2, "", "kdtune: error: this and that\n")
    monkeypatch.setenv("KDTUNE_TRACEBACK", "1")
    with pytest.raises(error):
        launcher.main(["run", "distil"])


def test_a_bug_keeps_its_traceback(shipped: Path) -> None:
    (shipped / "distil.py").write_text("raise KeyError('a bug')")
    with pytest.raises(KeyError):
        launcher.main(["run", "distil"])


# In processes of their own.


def start(*argv: str, **options: object) -> "subprocess.Popen[str]":
    root = Path(package.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "kdtune", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]


def test_module_runs(tmp_path: Path) -> None:
    process = start("--version", cwd=tmp_path)
    assert process.communicate()[0].startswith("kdtune ")
    assert process.returncode == 0


def test_ctrl_c_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('started', flush=True)\ntime.sleep(60)\n")
    process = start("run", "slow.py", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "\nkdtune: interrupted\n")


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("--help", cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert process.communicate()[1] == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["ls"],
        ["cat", "distil"],
        ["cp", "distil", "."],
        ["run", "distill"],
        ["run", "distil", "--config", "tinny"],
        ["data", "--help"],
        ["data", "distill"],
        ["plan", "--help"],
        ["plan", "distill"],
    ],
)
def test_torch_is_not_imported(argv: list[str], shipped: Path) -> None:
    code = f"""
import pathlib, sys
from kdtune.cli import catalog, main
catalog.folder = lambda: pathlib.Path({str(shipped)!r})
try:
    main.main({argv})
except SystemExit:
    pass
heavy = {{"torch", "transformers", "datasets", "omegaconf", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
