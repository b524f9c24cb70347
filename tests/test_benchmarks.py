"""The benchmarks run, at sizes that measure nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def run(program: str, *words: str) -> tuple[list[str], list[str]]:
    """The rows of the table, and the lines on variants that were left out."""
    command = [sys.executable, BENCHMARKS / program, "--threads", "1", "--rounds", "1", *words]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    _, _, *rows = [line for line in lines if line.startswith("|")]
    return rows, [line for line in lines if "left out" in line]


@pytest.mark.parametrize(
    ("program", "variants", "sizes"),
    [
        (
            "loss.py",
            "products kdtune dense",
            "--tokens 12 --vocabulary 50 --hidden 8 --teacher-hidden 16 --ignored 0.5",
        ),
        ("gradient_error.py", "kdtune dense", "--tokens 12 --vocabulary 50 --hidden 8"),
        ("data.py", "grouped packed", "--examples 20 --max-seq-len 512"),
        ("step.py", "kdtune", "--rows 2 --seq-len 12 --vocabulary 50 --hidden 16 --teacher-hidden 32 --layers 1"),
    ],
)
def test_without_peers(program: str, variants: str, sizes: str) -> None:
    rows, left_out = run(program, *sizes.split(), "--variants", *variants.split())
    assert len(rows) == len(variants.split())
    assert not left_out
    assert not any("NOT" in row for row in rows), "a loss that is not what it should be"


def test_a_peer_that_is_not_there_is_left_out_with_the_cure() -> None:
    rows, left_out = run("gradient_error.py", "--tokens", "4", "--vocabulary", "50", "--variants", "dense", "liger")
    assert len(rows) + len(left_out) == 2
    assert all("pip install" in line for line in left_out)


def test_a_set_is_found_again_in_the_cache() -> None:
    command = [sys.executable, BENCHMARKS / "large_set.py", "--rows", "50", "--workers", "0"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["into the cache", "out of the cache"]
