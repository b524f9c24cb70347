"""What holds for every file of the repository, whichever there are: who imports whom, that no setting is unread, that
each config loads and each command in the documentation works."""

import argparse
import ast
import dataclasses
import doctest
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
from kdtune.cli import catalog, compare, launch, report
from kdtune.cli.main import COMMANDS, main
from kdtune.cli.recipe import load_module

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kdtune"
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md"), *PACKAGE.rglob("*.md")])


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


def is_part(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def part(module: str) -> str | None:
    """The part of the library that a module is in: `models` of kdtune.models.decoder."""
    names = module.split(".")
    return names[1] if names[0] == "kdtune" and len(names) > 1 and is_part(names[1]) else None


def allowed() -> dict[str, set[str]]:
    """What each part of the library may import of it, beside itself, as CONTRIBUTING.md says."""
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {
        name: {other for other in re.findall(r"`(\w+)`", others) if is_part(other)} - {name}
        for names, others in rows
        for name in re.findall(r"`(\w+)`", names)
        if is_part(name)
    }


MAY_IMPORT = allowed()


def test_table_of_imports() -> None:
    assert MAY_IMPORT["losses"] == {"config"}
    assert MAY_IMPORT["dtensors"] == set()
    assert not [name for name, others in MAY_IMPORT.items() if "cli" in others]
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert MAY_IMPORT.keys() == packages | modules


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=relative)
def test_library_imports(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    others = {part(module) for module in imported(path)} - {None, own}
    if own != "__main__":
        assert "cli" not in others, "the launcher is imported by nobody"
    if own not in ("__init__", "__main__"):
        assert others <= MAY_IMPORT[own]
    tops = {module.partition(".")[0] for module in imported(path)}
    assert not tops & {"recipes", "transformers", "peft"}
    if own in ("config", "cli", "printable", "reporting", "__init__", "__main__"):
        assert "torch" not in tops


@pytest.mark.parametrize("path", [*sorted(PACKAGE.rglob("*.py")), *RECIPES], ids=relative)
def test_nothing_is_long(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 500
    for function in ast.walk(parse(path)):
        if not isinstance(function, ast.FunctionDef):
            continue
        docstring = function.body[0] if ast.get_docstring(function) else None
        skipped = range(docstring.lineno, (docstring.end_lineno or 0) + 1) if docstring else range(0)
        numbers = range(function.lineno, (function.end_lineno or 0) + 1)
        code = [number for number in numbers if lines[number - 1].strip() and number not in skipped]
        assert len(code) <= 80, function.name


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
    """The files of the part of the library that a section lives in, and others that name it.

    Of a recipe's whole Config, those that take such: what all recipes must do alike with their settings.
    """
    name = part(section.__module__)
    if name is None:
        return [path for path in PACKAGE.rglob("*.py") if "cfg: Any" in path.read_text()]
    naming = [path for path in PACKAGE.rglob("*.py") if re.search(rf"\b{section.__name__}\b", path.read_text())]
    return [*naming, *(sorted((PACKAGE / name).glob("*.py")) or [PACKAGE / f"{name}.py"])]


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


@functools.cache
def fill(schema: Any, path: Path | None) -> list[str]:
    """Overrides that give a value to the settings that a config leaves to its user, and to no other."""
    placeholder = {"str": "x", "int": "1", "float": "1"}
    kinds = {
        key: setting.choices[0] if setting.choices else placeholder.get(setting.type, "[]")
        for key, setting in described(schema).items()
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
    every = {found.path.resolve(): found for found in catalog.configs()}
    assert path in every
    shipped = every[path]
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert header
    assert shipped.title
    named = re.findall(r"--config[= ](\S+)", header[0])
    assert named
    for name in named:
        assert catalog.find_config(name, shipped.recipe).samefile(path)
    assert re.search(r"memory|GiB|GB|GPU|CPU", header[0], re.IGNORECASE), "the header says what it needs"


# Documentation.

WORDS = r"[a-z_]+(?:\.[a-z_0-9]+)*"  # a setting's key
PLACEHOLDER = re.compile(r"<[^<>]*>|\.\.\.|\[key=value")


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of a page's code blocks in any of the languages."""
    kinds = "|".join(languages)
    return re.findall(rf"^```(?:{kinds})\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(block: str) -> list[list[str]]:
    """The commands of a block, as their words."""
    lines = re.split(r"\n|&&", block.replace("\\\n", " "))
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


BLOCKS = [
    pytest.param(commands(block), id=f"{relative(page)}: {block.splitlines()[0]}")
    for page in PAGES
    for block in blocks(page, "bash", "sh", "console")
]


@pytest.mark.parametrize("session", BLOCKS)
def test_documented_commands(session: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, options and settings are right; running the recipes themselves is for their own tests.

    The commands of a block follow each other in one folder, so that a copied recipe is there when it is run.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdtune.cli.download._fetch", fetch_nothing)
    for program, *words in session:
        if any(PLACEHOLDER.search(word) for word in words):
            continue
        if program == "kdtune":
            try_command(words)
        elif program in ("python", "bash"):
            assert (ROOT / words[0]).is_file()
        else:
            assert program in {"pip", "pytest", "ruff", "mypy", "torchrun", ".ci/run"}, "a program that readers have"


def fetch_nothing(repo: str, folder: Path, *_: Any) -> None:
    """Leave what a download would, as far as the command looks at it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()


PLANNED = ("--budget", "--nproc-per-node", "--nnodes")


def try_command(words: list[str]) -> None:
    """What the command does, but for a run, a plan and a look at data, of which the settings are validated."""
    command, *rest = words
    if command == "sweep":
        words = [*words, "--dry-run"]
    if command in ("run", "data", "plan"):
        options = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
        for option in {"run": ("--dry-run",), "data": ("--val",), "plan": ("--json",)}[command]:
            options.add_argument(option, action="store_true")
        launched = [f"--{name}" for name, *_ in launch.OPTIONS]
        for option in {"run": launched, "data": ("--rows", "--start", "--html"), "plan": PLANNED}[command]:
            options.add_argument(option)
        words = ["validate", *options.parse_known_args(rest)[1]]
    if command in ("compare", "report"):  # of runs that are not there
        {"compare": compare, "report": report}[command].arguments(rest)
        return
    main(words)


@functools.cache
def schemas() -> list[Any]:
    return [load_module(path).Config for path in RECIPES]


@functools.cache
def described(schema: Any) -> dict[str, config.Setting]:
    return {setting.key: setting for setting in config.describe(schema)}


@functools.cache
def takes(schema: Any, key: str, text: str) -> bool:
    """Whether a recipe has the setting and accepts the value."""
    if key not in described(schema):  # unless it is in a section that the user names
        return any(re.fullmatch(re.escape(known).replace("<name>", "[a-z]+"), key) for known in described(schema))
    others = [pair for pair in fill(schema, None) if pair.partition("=")[0] != key]
    if not PLACEHOLDER.search(text):
        config.load(schema, None, [*others, f"{key}={text}"])
    return True


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_documented_settings(page: Path) -> None:
    """Every `key=value` and every `section.key` in the text is a setting of some recipe."""
    every = schemas()
    known = {key: setting.is_section for schema in every for key, setting in described(schema).items()}
    for code in inline_code(page):
        if code.startswith("key="):  # settings in general
            continue
        if pair := re.fullmatch(rf"({WORDS})=(.*)", code):
            assert any([takes(schema, *pair.groups()) for schema in every]), code
        elif re.fullmatch(WORDS, code) and known.get(code.partition(".")[0]):
            is_file = code.rpartition(".")[2] in {"json", "model", "py", "jsonl"}
            named = re.sub(r"(?<=sources\.)\w+", "<name>", code)
            assert is_file or {code, named} & known.keys() or "_component_" in code or code in FOREIGN, code


# Keys of torchtune, on the page for those who come from there.
FOREIGN = {"dataset.packed", "checkpointer.recipe_checkpoint"}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_documented_yaml(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        (schema,) = [schema for schema in schemas() if "kd_ratio" in described(schema)]
        config.load(schema, path, fill(schema, path))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", prose(linked), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_files_exist(page: Path) -> None:
    for code in inline_code(page):
        if path := re.match(r"(?:kdtune|recipes|tests|scripts|docs)/[\w./]+", code):
            assert (ROOT / path[0]).exists() or "<" in code, code
        if (named := re.fullmatch(r"(kdtune/[\w./]+\.py): ([\w.]+)", code)) is not None:
            assert re.search(rf"(def|class) {named[2].rpartition('.')[2]}\b", (ROOT / named[1]).read_text()), code


def test_pages_are_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)", index.read_text())}
    assert not set(ROOT.glob("docs/**/*.md")) - {index} - linked


def test_readme_is_short_and_has_every_command_and_recipe() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for command in COMMANDS:
        assert f"`kdtune {command}" in text, command
    for path in RECIPES:
        assert f"[`{path.stem}`](docs/{path.stem}.md)" in text
        assert f"]({path.name})" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=relative)
def test_documented_sessions(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page are one session, and print what they say."""
    monkeypatch.chdir(tmp_path)
    session = doctest.DocTestParser().get_doctest("\n".join(blocks(page, "python")), {}, relative(page), None, 0)
    report: list[str] = []
    assert not doctest.DocTestRunner().run(session, out=report.append).failed, "".join(report)
