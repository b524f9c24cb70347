"""ls, cat and cp."""

from pathlib import Path

import pytest

from .conftest import Run


def test_ls(shipped: Path, kdtune: Run) -> None:
    status, out, _ = kdtune("ls")
    assert status == 0
    assert out.splitlines()[:5] == [
        "distil  Pretend to distil: distil.",
        "    llama/8B_to_1B  Llama 8B to 1B.",
        "    tiny            A tiny pair.",
        "",
        "finetune  Pretend to distil: finetune.",
    ]


def test_ls_of_one_recipe(shipped: Path, kdtune: Run) -> None:
    out = kdtune("ls", "finetune_single_device")[1]
    assert "finetune  Pretend" in out
    assert "distil  Pretend" not in out
    assert "Did you mean finetune?" in kdtune("ls", "finetun")[2]


def test_ls_of_nothing(tmp_path: Path, shipped: Path, kdtune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtune.cli.catalog.folder", lambda: tmp_path / "empty")
    assert kdtune("ls")[0] == 0
    assert kdtune("run", "x")[0] == 2


def test_cat(shipped: Path, kdtune: Run) -> None:
    assert kdtune("cat", "tiny/distil")[1] == (shipped / "configs/tiny/distil.yaml").read_text()
    assert kdtune("cat", "one")[1] == (shipped / "configs/one/finetune.yaml").read_text()
    assert kdtune("cat", "distil_distributed")[1] == (shipped / "distil.py").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("distill", "Did you mean distil?"),
        ("8B_to_1B", "Did you mean llama/8B_to_1B?"),
        ("tiny", "has several: name one of tiny/distil, tiny/finetune."),
        ("nope.yaml", "No config file nope.yaml."),
        ("nope.py", "No recipe file nope.py."),
    ],
)
@pytest.mark.parametrize("command", ["cat", "cp"])
def test_no_such_file(command: str, name: str, words: str, shipped: Path, kdtune: Run) -> None:
    status, out, err = kdtune(command, name, *(["copy"] if command == "cp" else []))
    assert (status, out) == (2, "")
    assert words in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "to", "copy", "launch"),
    [
        ("distil", "mine", "mine.py", "kdtune run mine.py --config llama/8B_to_1B"),
        ("distil", "./mine.py", "mine.py", "kdtune run mine.py --config llama/8B_to_1B"),
        ("distil_distributed", ".", "distil.py", "kdtune run distil.py --config llama/8B_to_1B"),
        ("finetune", "a b", "a b.py", "kdtune run 'a b.py' --config one/finetune"),
        ("llama/8B_to_1B", ".", "8B_to_1B.yaml", "kdtune run distil --config 8B_to_1B.yaml"),
        ("tiny/finetune", "1.5B", "1.5B.yaml", "kdtune run finetune --config 1.5B.yaml"),
    ],
)
def test_cp(name: str, to: str, copy: str, launch: str, shipped: Path, kdtune: Run) -> None:
    status, out, _ = kdtune("cp", name, to)
    assert status == 0
    assert out == f"Copied to {copy}. Run it with:\n  {launch}\n"
    assert [path.name for path in Path().iterdir()] == [copy]
    assert Path(copy).read_text() == kdtune("cat", name)[1]


def test_cp_never_overwrites_by_itself(shipped: Path, kdtune: Run) -> None:
    Path("mine.py").write_text("precious")
    status, out, err = kdtune("cp", "distil", "mine")
    assert (status, out) == (2, "")
    assert "mine.py is there already" in err
    assert Path("mine.py").read_text() == "precious"
    assert kdtune("cp", "distil", "mine", "--force")[0] == 0
    assert Path("mine.py").read_text() == (shipped / "distil.py").read_text()
    status, _, err = kdtune("cp", "mine.py", ".", "--force")
    assert status == 2
    assert "is the file itself" in err
    assert Path("mine.py").stat().st_size


def test_cp_makes_folders_only_when_asked(shipped: Path, kdtune: Run) -> None:
    for to in ("a/b/mine", "a/"):
        status, _, err = kdtune("cp", "distil", to)
        assert status == 2
        assert "--make-parents" in err
        assert not Path("a").exists()
    assert kdtune("cp", "distil", "a/b/mine", "--make-parents")[0] == 0
    assert kdtune("cp", "distil", "c/", "--make-parents")[0] == 0
    assert Path("a/b/mine.py").is_file()
    assert Path("c/distil.py").is_file()
