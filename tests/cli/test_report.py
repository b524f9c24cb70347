"""`kdtune report`: from a real run to a page, at once and without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from reporting.folders import Page, write_run

from .conftest import Run


def test_a_report_of_a_real_run(tiny: Path, tmp_path: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output_dir = tmp_path / "run"
    arguments = tiny_runs.arguments(tiny, output_dir, recipe="knowledge_distillation")
    status, out, _ = kdtune(*arguments, *tiny_runs.validated_on(tiny))
    assert status == 0
    assert f"kdtune report {output_dir}" in out
    status, out, err = kdtune("report", str(output_dir))
    assert (status, err) == (0, "")
    path = tmp_path / "report.html"
    assert out == f"The report is in report.html. Open it in a browser: {path.as_uri()}\n"
    page = Page(path.read_text(encoding="utf-8"))
    for said in ("Validation cross-entropy went from", "The teacher's own is", "Top-1 agreement", "kd_loss.name"):
        assert said in page.text
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "FOLDER"),
        (["run", "--output", "report.txt"], "give a file that ends in .html"),
        (["run", "--output", "no/such/report.html"], "a folder that exists"),
        (["nowhere"], "there is no such folder"),
        (["run", "--outptu", "x.html"], "unrecognized arguments"),
    ],
)
def test_calls_that_are_refused(
    arguments: list[str], complaint: str, tmp_path: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    status, out, err = kdtune("report", *arguments)
    assert (status, out) == (2, "")
    assert complaint in err
    assert not list(tmp_path.glob("**/*.html"))


def test_it_imports_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    code = (
        "import sys; from kdtune.cli.main import main; main(['report', *sys.argv[1:]]); "
        "print([name for name in ('torch', 'omegaconf', 'datasets') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(folder), "--output", str(tmp_path / "a.html")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.endswith("\n[]\n")
