"""What holds for every file of the repository, whichever there are: who imports whom, that no setting is unread, that
each config loads and each command in the documentation works."""

import ast
import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdtune import config
from kdtune.cli import catalog
from kdtune.cli.main import main
from kdtune.cli.recipe import load_module

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kdtune"
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")])

# What a part of the library may import of it, beside itself; a part that is not listed may import any but the launcher.
MAY_IMPORT = {
    "config": set[str](),
    "losses": set[str](),
    "models": {"config"},
    "tokenizers": {"config"},
    "data": {"config", "tokenizers"},
    "teacher": {"config", "data", "models", "losses"},
    "checkpoint": {"config", "models", "tokenizers"},
    "generation": {"config", "models", "tokenizers"},
    "cli": {"cli", "config"},
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules (or names in them) that a file imports, wherever in it."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    """The part of the library that a module is in: `models` of kdtune.models.decoder."""
    names = module.split(".")
    is_part = len(names) > 1 and ((PACKAGE / names[1]).is_dir() or (PACKAGE / f"{names[1]}.py").is_file())
    return names[1] if names[0] == "kdtune" and is_part else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=relative)
def test_library_imports(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    others = {part(module) for module in imported(path)} - {None, own}
    if own != "__main__":
        assert "cli" not in others, "the launcher is imported by nobody"
    assert others <= MAY_IMPORT.get(own, others)
    tops = {module.partition(".")[0] for module in imported(path)}
    assert not tops & {"recipes", "transformers", "peft"}
    if own in ("config", "cli", "__init__", "__main__"):
        assert "torch" not in tops


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_imports(path: Path) -> None:
    stems = {recipe.stem for recipe in RECIPES}
    for module in imported(path):
        assert part(module) != "cli"
        assert module.partition(".")[0] not in {"recipes", *stems}, "recipes do not import each other"


def test_launcher_imports_nothing_heavy() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((PACKAGE / "cli").glob("*.py"))]
    code = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'omegaconf', 'datasets') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


# Settings.


def sections(schema: Any) -> Iterator[Any]:
    """A config dataclass and those inside it."""
    yield schema
    for hint in typing.get_type_hints(schema).values():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        for inner in typing.get_args(hint) if is_union else (hint,):
            if dataclasses.is_dataclass(inner):
                yield from sections(inner)


def attributes_read(paths: list[Path]) -> set[str]:
    nodes = (node for path in paths for node in ast.walk(parse(path)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def owner(section: Any) -> list[Path]:
    """The files of the part of the library that a section lives in."""
    name = part(section.__module__)
    if name is None:
        return []
    return sorted((PACKAGE / name).glob("*.py")) or [PACKAGE / f"{name}.py"]


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_no_setting_is_unread(path: Path) -> None:
    for section in sections(load_module(path).Config):
        read = attributes_read([path, *owner(section)])
        unread = [field.name for field in dataclasses.fields(section) if field.name not in read]
        assert not unread, f"{section.__module__}.{section.__name__}"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_every_setting_is_explained(path: Path) -> None:
    silent = [setting.key for setting in config.describe(load_module(path).Config) if not setting.comment]
    assert not silent


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_says_what_it_is(path: Path) -> None:
    assert 0 < len(catalog.title(path)) <= 120


# Configs.


def fill(schema: Any, path: Path) -> list[str]:
    """Overrides that give a value to the settings that a config leaves to its user, and to no other."""
    placeholder = {"str": "x", "int": "1", "float": "1"}
    kinds = {
        setting.key: setting.choices[0] if setting.choices else placeholder.get(setting.type, "[]")
        for setting in config.describe(schema)
    }
    try:
        config.load(schema, path, [])
    except ValueError as error:
        missing = re.search(r"^no value for (.*?)\. ", str(error), re.MULTILINE)
        return [f"{key}={kinds[key]}" for key in missing[1].split(", ")] if missing else []
    return []


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_loads(path: Path) -> None:
    recipe = catalog.launched_by(path)
    assert recipe in catalog.recipes(), "the header's launch line names the recipe"
    schema = load_module(catalog.find_recipe(recipe)).Config
    config.load(schema, path, fill(schema, path))


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_header(path: Path) -> None:
    (shipped,) = [found for found in catalog.configs() if found.path.samefile(path)]
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert header
    assert shipped.title
    named = re.findall(r"--config[= ](\S+)", header[0])
    assert named
    for name in named:
        assert catalog.find_config(name, shipped.recipe).samefile(path)
    assert re.search(r"memory|GiB|GB|GPU|CPU", header[0], re.IGNORECASE), "the header says what it needs"


# Documentation.


def commands(page: Path) -> Iterator[list[str]]:
    """The kdtune commands in a page's code blocks, without those that hold a placeholder."""
    for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            text = line.strip().removeprefix("$ ")
            if text.startswith("kdtune ") and not re.search(r"<[\w .|/]+>|\.\.\.", text):
                yield shlex.split(text, comments=True)[1:]


DOCUMENTED = [
    pytest.param(argv, id=f"{page.name}: {shlex.join(argv)}") for page in PAGES for argv in commands(page) if argv
]


@pytest.mark.parametrize("argv", DOCUMENTED)
def test_documented_command(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, options and settings are right; running the recipes themselves is for their own tests."""
    command, *rest = argv
    monkeypatch.chdir(tmp_path)
    if command in ("run", "validate"):
        words = [word for word in rest if word != "--dry-run"]
        if any(word.endswith((".py", ".yaml")) for word in words):
            pytest.skip("a file of the reader's own")
        if "--help" not in words:
            name = catalog.find_recipe(words[0])
            given = next((words[i + 1] for i, word in enumerate(words) if word == "--config"), None)
            if given:
                shipped = catalog.find_config(given, name.stem)
                words += [
                    pair
                    for pair in fill(load_module(name).Config, shipped)
                    if pair.partition("=")[0] not in {word.partition("=")[0] for word in words}
                ]
        main(["validate", *words])
    elif command == "download":
        pytest.skip("needs the network")
    else:
        main(argv)
