"""The study: `kdtune sweep` accepts every call of its script, and its tables say what the runs ended with."""

from __future__ import annotations

import json
import os
import re
import runpy
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdtune.cli.main import main

ROOT = Path(__file__).parents[2]
# In the place of kdtune: writes its arguments down, one per line.
NOTE = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" end-of-call >> "$CALLS"\n'


Calls = Callable[..., list[list[str]]]


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    """What the script calls, of these parts or of all, with such variables."""
    program = tmp_path / "bin" / "kdtune"
    program.parent.mkdir()
    program.write_text(NOTE)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(*parts: str, **variables: str) -> list[list[str]]:
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "CALLS": str(tmp_path / "calls"), "STUDY": str(tmp_path / "study"), **variables}
        subprocess.run(["bash", str(ROOT / "scripts" / "study.sh"), *parts], env={**os.environ, **env}, check=True)
        text = (tmp_path / "calls").read_text()
        # The template of the other task has a line of its own.
        return [re.split(r"\n(?!Question: )", call.strip("\n")) for call in text.split("end-of-call\n") if call]

    return run


def test_every_call_of_the_study_is_accepted(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    swept = set()
    for command, *words in calls():
        main([command, *words, "--dry-run"] if command == "sweep" else ["validate", *words])
        swept |= {Path(word.partition("=")[2]).name for word in words if word.startswith("output_dir=")}
    parts = runpy.run_path(str(ROOT / "scripts" / "study.py"))["PARTS"]
    assert {sweep for part in parts for sweep in part.sweeps} <= swept
    assert "waiting" in capsys.readouterr().out


def test_longer_runs(calls: Calls) -> None:
    (words,) = calls("compute", STEPS="600", MORE="device=cuda epochs=3", SEEDS="7")
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    expected = {"max_steps": "950", "device": "cuda", "epochs": "3", "seed": "7", "kd_ratio": "0"}
    assert expected.items() <= settings.items()


def finish(study: Path, sweep: str, runs: list[tuple[dict[str, str], list[float]]]) -> None:
    """Runs that ended with the last of these cross-entropies, the others being those of steps 0, 20, 40, ..."""
    records = []
    for values, losses in runs:
        name = ",".join(values.values())
        folder = study / sweep / name
        folder.mkdir(parents=True)
        lines = [
            {"step": 20 * i, "val_ce_loss": loss, "val_kd_loss": loss / 10, "val_agreement": 0.5}
            for i, loss in enumerate(losses)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        records.append({"name": name, "values": values, "state": "done"})
    (study / sweep / "sweep.json").write_text(json.dumps({"kdtune_sweep": 1, "runs": records}))


def test_tables(tmp_path: Path) -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "study.py"))
    finish(
        tmp_path,
        "main",
        [
            ({"kd_ratio": "1", "seed": "0"}, [3.0, 2.4, 2.0]),
            ({"kd_ratio": "1", "seed": "1"}, [3.0, 2.5, 2.1]),
            ({"kd_ratio": "0", "seed": "0"}, [3.0, 2.8, 2.5]),
            ({"kd_ratio": "0", "seed": "1"}, [3.0, 2.7, 2.4]),
        ],
    )
    finish(tmp_path, "temperature", [({"kd_loss.temperature": "2", "seed": "1"}, [3.0, 2.6])])
    of_rate = {"kd_ratio": "0", "seed": "1"}
    finish(tmp_path, "lr", [({**of_rate, "optimizer.lr": rate}, [3.0, 2.7]) for rate in ("4e-3", "5e-4")])
    finish(tmp_path, "tuned", [({"kd_ratio": "1", "seed": "1"}, [3.0, 1.9])])
    finish(tmp_path, "divergence_tuned", [({"kd_loss.name": "jsd", "seed": "1"}, [3.0, 2.2])])
    # 0.5 and 0.3 ahead: 0.4 on average, with 0.1 of error. 2.45 is first passed at step 20, where both average 2.45.
    assert "0.400 nats ahead, standard error 0.1000 over 2 seeds: 4 of them" in script["claim"](tmp_path, "main")
    assert "2.450, has been reached with the teacher by step 20" in script["claim"](tmp_path, "main")
    lines = "\n".join(script["tables"](tmp_path)).splitlines()
    assert "| teacher alone | 2 | 2.050 ± 0.071 | 0.2050 ± 0.0071 | 0.5000 ± 0.0000 |  |" in lines
    assert "| labels alone | 2 | 2.450 ± 0.071 | 0.2450 ± 0.0071 | 0.5000 ± 0.0000 | +0.400 ± 0.100 |" in lines
    rates = [line.split(" |")[0].removeprefix("| ") for line in lines if ", lr 0" in line]
    assert rates == [
        *("labels alone, lr 0.0005", "labels alone, lr 0.002", "labels alone, lr 0.004"),
        *("teacher alone, lr 0.001", "teacher alone, lr 0.002"),
    ]
    assert "| jsd | 1 | 2.2000 | 0.2200 | 0.5000 | +0.300 |" in lines  # to the same learning rate
    assert "| temperature 2 | 1 | 2.6000 | 0.2600 | 0.5000 | +0.500 |" in lines  # to the same seed


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures of the study are drawn with matplotlib")
    script = runpy.run_path(str(ROOT / "scripts" / "study.py"))
    both = [({"kd_ratio": ratio, "seed": seed}, [3.0, 2.0 + int(seed + ratio) / 10]) for ratio in "10" for seed in "01"]
    finish(tmp_path, "main", both)
    script["draw"](tmp_path, tmp_path)
    assert "labels alone" in (tmp_path / "study_settings.svg").read_text()
    assert (tmp_path / "study_curves.svg").exists()
