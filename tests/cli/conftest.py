"""A folder of recipes like the shipped one, but small, fast and without torch."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from kdtune.cli import catalog
from kdtune.cli.main import main

RECIPE = '''"""Pretend to distil: {name}.

More of the docstring.
"""

from dataclasses import dataclass, fields

from kdtune.config import MISSING, setting


@dataclass
class Rows:
    source: str = MISSING  # file or folder
    limit: int | None = setting(None, gt=0)  # rows; null: all


@dataclass
class Config:
    output_dir: str = MISSING  # where everything goes
    batch_size: int = setting(4, gt=0)  # rows per step
    dataset: Rows = setting(Rows)  # rows to train on
    dataset_val: Rows | None = None  # rows to validate on


def check(cfg):
    print("checked", [field.name for field in fields(cfg)])


def main(cfg):
    check(cfg)
    print("trained", cfg)
'''
CONFIG = """# {title}
# Memory: none.
#
#     kdtune run {recipe} --config {name}

output_dir: runs/{recipe}
dataset:
  source: rows.json
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes distil and finetune; configs tiny/distil, tiny/finetune, llama/8B_to_1B and one/finetune."""
    folder = tmp_path / "recipes"
    for config, recipe, name, title in [
        ("tiny/distil", "distil", "tiny", "A tiny pair."),
        ("tiny/finetune", "finetune", "tiny", "A tiny model."),
        ("llama/8B_to_1B", "distil", "llama/8B_to_1B", "Llama 8B to 1B."),
        ("one/finetune", "finetune", "one", "One."),
    ]:
        path = folder / "configs" / f"{config}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CONFIG.format(recipe=recipe, name=name, title=title))
    for name in ("distil", "finetune"):
        (folder / f"{name}.py").write_text(RECIPE.format(name=name))
    (folder / "_hidden.py").touch()
    monkeypatch.setattr(catalog, "folder", lambda: folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


@pytest.fixture
def kdtune(capsys: pytest.CaptureFixture[str]) -> Run:
    """`kdtune("ls")`: exit status, what it printed, what it complained of."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = 0
        try:
            main(argv)
        except SystemExit as end:
            status = cast(int, end.code)
        out, err = capsys.readouterr()
        return status, out, err

    return run
