"""The benchmarks run, at sizes that measure nothing."""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"

Run = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(program, *words)`: the rows of the table, and the lines on variants that were left out."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(program: str, *words: str) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / program), "--threads", "1", "--rounds", "1", *words])
        runpy.run_path(sys.argv[0], run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        _, _, *rows = [line for line in lines if line.startswith("|")]
        return rows, [line for line in lines if "left out" in line]

    return run


@pytest.fixture
def one_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants are called where they are named: half of a minute less for all programs than with their processes."""
    import harness

    given: list[tuple[argparse.ArgumentParser, Mapping[str, Any]]] = []

    def parse(parser: argparse.ArgumentParser, variants: Mapping[str, Any]) -> argparse.Namespace:
        given[:] = [(parser, variants)]
        return parser.parse_args()

    class Worker:
        reason = ""

        def __init__(self, name: str, extra: list[str], log: Path):
            ((parser, variants),) = given
            self._arguments, self._make = parser.parse_args([*sys.argv[1:], *extra]), variants[name].make
            self._call: Callable[[], harness.Answer] | None = None

        def ask(self) -> harness.Answer:
            self._call = self._call or self._make(self._arguments)
            return self._call()

        def close(self) -> None:
            pass

    monkeypatch.setattr(harness, "parse", parse)
    monkeypatch.setattr(harness, "_Worker", Worker)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("program", "variants", "sizes"),
    [
        (
            "loss.py",
            "products kdtune dense",
            "--tokens 12 --vocabulary 50 --hidden 8 --teacher-hidden 16 --ignored 0.5",
        ),
        ("gradient_error.py", "kdtune dense", "--tokens 12 --vocabulary 50 --hidden 8"),
        ("optimizers.py", "torch fp32 8bit_stochastic", "--vocabulary 512 --hidden 16 --layers 1"),
        ("saving.py", "at_once in_background", "--vocabulary 50 --hidden 24 --layers 1"),
        ("quantization.py", "full int4 fp8_dynamic", "--tokens 12 --hidden 128 --layers 1 --rows 2"),
        (
            "teacher_cache.py",
            "kdtune-8 kdtune-200 kdtune-hidden distillkit-16 megatron nemo-aligner",
            "--sources 97 quickstart --tokens 5 --examples 2",
        ),
        (
            "cached_teacher.py",
            "finetune live projected samples-200 hidden forward ask-hidden read-top-64",
            "--rows 2 --steps 1",
        ),
        ("data.py", "grouped packed", "--examples 20 --max-seq-len 512"),
        ("scoring.py", "kdtune apart hf-8", "--questions 2 --shots 1"),
        (
            "adapters.py",
            "all lora dora",
            "--rows 2 --seq-len 12 --vocabulary 50 --hidden 16 --layers 1 --rank 2",
        ),
        pytest.param("memory.py", "plain adapter", "--rows 1 --seq-len 16", marks=pytest.mark.slow),
        (
            "step.py",
            "kdtune kdtune-small kdtune-lora",
            "--rows 2 --seq-len 12 --vocabulary 50 --hidden 16 --teacher-hidden 32 --layers 1",
        ),
    ],
)
def test_without_peers(program: str, variants: str, sizes: str, run: Run, one_process: None) -> None:
    rows, left_out = run(program, *sizes.split(), "--variants", *variants.split())
    assert len([row for row in rows if not row.startswith(("|  ", "| -"))]) == len(variants.split())
    assert not left_out
    assert not any("NOT" in row for row in rows), "a loss that is not what it should be"


def test_from_rows_to_batches(run: Run, one_process: None) -> None:
    (row,), left_out = run("data.py", "--examples", "50", "--max-seq-len", "512", "--variants", "here", "workers")
    name, tokens, *_, packed, grouped, in_order = (cell.strip(" %") for cell in row.strip("|").split("|"))
    assert name == "GSM8K, quickstart"
    assert float(tokens) == 0.01
    assert float(in_order) < min(float(packed), float(grouped))
    assert not left_out


def test_processes_and_a_peer_that_is_not_there(run: Run) -> None:
    rows, left_out = run("gradient_error.py", "--tokens", "4", "--vocabulary", "50", "--variants", "dense", "liger")
    assert len(rows) + len(left_out) == 2
    assert rows, "a variant that is there has an answer"
    assert all("pip install" in line for line in left_out), "the cure"


@pytest.mark.slow
def test_a_set_is_found_again_in_the_cache() -> None:
    command = [sys.executable, BENCHMARKS / "large_set.py", "--rows", "50", "--workers", "0"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if "first step" in line] == ["into the cache", "out of the cache"]


@pytest.mark.slow
def test_students_of_a_cache(tmp_path: Path) -> None:
    few = ["--variants", "live", "top-8", "--seeds", "0", "--steps", "1", "--val-split", "[:2]"]
    command = [sys.executable, BENCHMARKS / "cached_students.py", *few, "--output", tmp_path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names[2:] == ["live", "top 8"]
