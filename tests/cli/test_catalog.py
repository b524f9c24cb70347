"""Names to files."""

from pathlib import Path

import pytest

from kdtune.cli import catalog


def test_the_folder_is_the_list(shipped: Path) -> None:
    assert catalog.recipes() == ["distil", "finetune"]
    assert [config.name for config in catalog.configs()] == ["llama/8B_to_1B", "one", "tiny", "tiny"]
    assert [config.name for config in catalog.configs("distil")] == ["llama/8B_to_1B", "tiny"]
    assert catalog.configs("distil")[0].title == "Llama 8B to 1B."


@pytest.mark.parametrize("name", ["distil", "distil_single_device", "distil_distributed"])
def test_recipe_by_name(name: str, shipped: Path) -> None:
    assert catalog.find_recipe(name) == shipped / "distil.py"


def test_recipe_by_path(shipped: Path) -> None:
    Path("mine.py").touch()
    for name in ("mine.py", "./mine.py", str(Path.cwd() / "mine.py"), "../elsewhere/mine.py"):
        assert catalog.find_recipe(name).samefile("mine.py")
        assert catalog.find_recipe(name).is_absolute()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("distill", "Did you mean distil?"),
        ("zzz", "There are: distil, finetune."),
        ("mine", "For the file of that name here, give mine.py."),
        ("./mine", "Did you mean mine.py?"),
        ("./nope.py", "No recipe file ./nope.py."),
        ("", "No recipe is called ''."),
    ],
)
def test_no_such_recipe(name: str, words: str, shipped: Path) -> None:
    Path("mine.py").touch()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        catalog.find_recipe(name)
    assert words in str(caught.value)


def test_config_by_name(shipped: Path) -> None:
    assert catalog.find_config("llama/8B_to_1B") == shipped / "configs/llama/8B_to_1B.yaml"
    assert catalog.find_config("llama/8B_to_1B.yaml") == shipped / "configs/llama/8B_to_1B.yaml"
    assert catalog.find_config("tiny", "finetune") == shipped / "configs/tiny/finetune.yaml"
    assert catalog.find_config("tiny/distil", "finetune") == shipped / "configs/tiny/distil.yaml"
    assert catalog.find_config("one") == shipped / "configs/one/finetune.yaml"


def test_config_by_path(shipped: Path) -> None:
    for name in ("mine.yaml", "other.yml", "tiny"):
        Path(name).touch()
    assert catalog.find_config("mine.yaml") == Path("mine.yaml")
    assert catalog.find_config("./other.yml") == Path("other.yml")
    assert catalog.find_config("tiny", "distil") == shipped / "configs/tiny/distil.yaml"
    assert catalog.find_config("./tiny") == Path("tiny")


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("8B_to_1b", "distil", "Did you mean llama/8B_to_1B?"),
        ("llama/8B_to_2B", "distil", "Did you mean llama/8B_to_1B?"),
        ("tinny", "finetune", "Did you mean tiny?"),
        ("tiny", "mine", "has none called mine: name one of tiny/distil, tiny/finetune."),
        ("tiny", None, "has several: name one of tiny/distil, tiny/finetune."),
        ("nope.yaml", "distil", "No config file nope.yaml."),
        ("mine", "distil", "give mine.yaml."),
        ("", "distil", "No config is called ''."),
    ],
)
def test_no_such_config(name: str, recipe: str | None, words: str, shipped: Path) -> None:
    Path("mine.yaml").touch()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        catalog.find_config(name, recipe)
    assert words in str(caught.value)
