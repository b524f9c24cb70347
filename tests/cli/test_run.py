"""run and validate: from arguments to a recipe's Config."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import RECIPE, Run

TRAINED = (
    "trained Config(output_dir='runs/distil', batch_size=4, "
    "dataset=Rows(source='rows.json', limit=None), dataset_val=None)"
)


def test_run(shipped: Path, kdtune: Run) -> None:
    status, out, err = kdtune("run", "distil", "--config", "tiny")
    assert (status, err) == (0, "")
    assert out.splitlines()[1] == TRAINED


@pytest.mark.parametrize("config", [["--config", "tiny"], ["--config=tiny"], ["--config", "tiny/distil"]])
def test_options_stand_anywhere_after_the_recipe(config: list[str], shipped: Path, kdtune: Run) -> None:
    expected = TRAINED.replace("batch_size=4", "batch_size=1").replace("runs/distil", "a=b")
    for parts in itertools.permutations([config, ["batch_size=1"], ["output_dir=a=b"]]):
        status, out, _ = kdtune("run", "distil", *itertools.chain(*parts))
        assert status == 0
        assert expected in out


def test_torchtunes_names(shipped: Path, kdtune: Run) -> None:
    for name in ("distil_single_device", "distil_distributed"):
        assert TRAINED in kdtune("run", name, "--config", "tiny")[1]


def test_dry_run_only_checks(shipped: Path, kdtune: Run) -> None:
    status, out, _ = kdtune("run", "distil", "--dry-run", "--config", "tiny")
    assert status == 0
    assert out.startswith("checked")
    assert "trained Config" not in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no recipe is named"),
        (["--config", "tiny"], "no recipe is named"),
        (["--gpus", "2", "distil"], "--gpus is no option of kdtune run"),
        (["--nproc-per-nod", "2", "distil"], "no recipe is named. Did you mean --nproc-per-node?"),
        (["distill"], "Did you mean distil?"),
        (["distil", "--config"], "argument --config: expected one argument"),
        (["distil", "--config", "tinny"], "Did you mean tiny?"),
        (["distil", "--config", "tiny", "--config", "one"], "--config is given 2 times"),
        (["distil", "batch_size"], "Did you mean batch_size=...?"),
        (["distil", "--batch_size", "4"], "Did you mean batch_size=4?"),
        (["distil", "--batch_size=4"], "Did you mean batch_size=4?"),
        (["distil", "tiny"], "settings are given as key=value. Did you mean --config tiny?"),
        (["distil", "--dryrun", "--config", "tiny"], "Did you mean --dry-run?"),
        (["distil", "--config", "tiny", "batchsize=4"], "Did you mean batch_size?"),
        (["distil", "--config", "tiny", "batch_size=0"], "batch_size must be > 0, got 0."),
        (["distil"], "no value for output_dir, dataset.source."),
        (["missing/file.py"], "No recipe file missing/file.py."),
    ],
)
def test_mistakes(argv: list[str], words: str, shipped: Path, kdtune: Run) -> None:
    status, out, err = kdtune("run", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("kdtune: error: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_config_of_another_recipe(shipped: Path, kdtune: Run) -> None:
    text = (shipped / "finetune.py").read_text()
    (shipped / "finetune.py").write_text(text.replace("output_dir", "folder"))
    _, _, err = kdtune("run", "finetune", "--config", "tiny/distil")
    assert "unknown setting output_dir" in err
    assert "is written for the recipe distil." in err


def test_a_copied_recipe_runs_from_anywhere(shipped: Path, kdtune: Run, tmp_path: Path) -> None:
    kdtune("cp", "distil", "sub/mine.py", "--make-parents")
    for name in ("sub/mine.py", "./sub/mine.py", str(Path("sub/mine.py").absolute())):
        assert TRAINED in kdtune("run", name, "--config", "tiny/distil")[1]
    status, _, err = kdtune("run", "sub/mine.py", "--config", "tiny")
    assert status == 2
    assert "name one of tiny/distil, tiny/finetune." in err


def test_a_recipe_hides_no_module_and_finds_those_beside_it(
    shipped: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("beside_the_recipe.py").write_text("VALUE = 5\n")
    Path("random.py").write_text(RECIPE + "\nimport beside_the_recipe\nassert beside_the_recipe.VALUE == 5\n")
    before = sys.modules.get("random")
    assert kdtune("run", "random.py", "--config", "tiny/distil")[0] == 0
    assert sys.modules.get("random") is before


def test_no_recipe_in_the_file(shipped: Path, kdtune: Run) -> None:
    Path("script.py").write_text("def main(cfg): ...\nclass Config: ...\n")
    status, _, err = kdtune("run", "script.py")
    assert status == 2
    assert "script.py is no recipe: it has no Config and no check." in err


@pytest.mark.parametrize("columns", [60, 80, 120, 300])
def test_help_lists_every_setting(columns: int, shipped: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = kdtune("run", "distil", "--help")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("usage: kdtune run distil ")
    assert "Pretend to distil: distil." in lines
    assert "Configs: llama/8B_to_1B, tiny" in lines
    assert lines[lines.index("  batch_size=4                              int, > 0") + 1] == "      rows per step"
    assert "  output_dir=...                            str, required" in lines
    assert "dataset: rows to train on" in lines
    assert "  dataset.limit=null                        int or null, > 0" in lines
    assert "dataset_val: rows to validate on; null unless one of its settings is given" in lines
    assert max(map(len, lines)) <= min(max(columns, 80), 120)


def test_validate(shipped: Path, kdtune: Run) -> None:
    status, out, _ = kdtune("validate", "distil", "--config", "tiny")
    assert (status, out) == (0, f"{shipped}/configs/tiny/distil.yaml: valid for distil.\n")
    status, out, err = kdtune("validate", "distil", "--config", "tiny", "batch_size=x")
    assert (status, out) == (2, "")
    assert 'batch_size wants int, got "x".' in err


def test_from_the_shell(tmp_path: Path, shipped: Path) -> None:
    Path("mine.py").write_text(RECIPE)
    command = [sys.executable, "-m", "kdtune", "run", "mine.py", "output_dir=a b", "dataset.source=[x]", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "checked ['output_dir', 'batch_size', 'dataset', 'dataset_val']" in done.stdout


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.mark.skipif(sys.platform != "linux", reason="segments grow on Linux")
@pytest.mark.parametrize("own", [None, *NAMES])
@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_segments_of_the_allocator_grow_unless_the_user_chose(
    device: str, own: str | None, shipped: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = shipped / "distil.py"
    seen_on_import = f"import os\nseen = [os.environ.get(name) for name in {NAMES}]\n"
    text = recipe.read_text().replace("    batch_size", f'    device: str = "{device}"  # where\n    batch_size', 1)
    recipe.write_text(text.replace("from dataclasses", seen_on_import + "from dataclasses", 1) + "    print(seen)\n")
    for name in NAMES:
        monkeypatch.setenv(name, "garbage_collection_threshold:0.8")
        if name != own:
            monkeypatch.delenv(name)
    status, out, err = kdtune("run", "distil", "--config", "tiny")
    assert (status, err) == (0, "")
    if own is None:
        assert "['expandable_segments:True', None, None]" in out
        assert out.count("expandable_segments:True, which") == (device == "cuda:1")
    else:
        assert str([("garbage_collection_threshold:0.8" if name == own else None) for name in NAMES]) in out
        assert "expandable" not in out
