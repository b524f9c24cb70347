"""Which recipes and configs there are. The folder is the list: there is no registry to keep in step.

In a wheel the recipes lie inside the package (`kdtune/_recipes`), in a checkout beside it.
"""

import ast
import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ALIASES = ("_single_device", "_distributed")
_LAUNCH = re.compile(r"kdtune run (?P<recipe>\S+)(?: .*?)? --config[= ](?P<config>\S+)")


@dataclasses.dataclass(frozen=True)
class Config:
    """A shipped YAML file, as its header describes it."""

    name: str  # llama3_2/8B_to_1B_KD; the folder alone if the file is named after its recipe
    path: Path
    title: str  # first line of the header
    recipe: str | None  # out of the launch line


def folder() -> Path:
    """Where the recipes are."""
    inside = _PACKAGE / "_recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def title(recipe: Path) -> str:
    """First line of a recipe's docstring, read without running it."""
    text = ast.get_docstring(ast.parse(recipe.read_bytes())) or ""
    return text.partition("\n")[0]


def configs(recipe: str | None = None) -> list[Config]:
    """The shipped configs, or those of one recipe."""
    every = [_config(path) for path in sorted((folder() / "configs").rglob("*.yaml"))]
    return [config for config in every if recipe in (None, config.recipe)]


def bare_name(recipe: str) -> str:
    """The recipe that a name means: torchtune's `_single_device` and `_distributed` twins are one file here."""
    if recipe not in recipes():
        for alias in _ALIASES:
            recipe = recipe.removesuffix(alias)
    return recipe


def find_recipe(name: str) -> Path:
    """The file of a recipe, given by name or as a path to any Python file.

    Raises:
        ValueError: no such recipe, with the nearest names.
        FileNotFoundError: no such file.
    """
    if name.endswith(".py") or "/" in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path.absolute()
        with_suffix = path.with_name(path.name + ".py")
        advice = f"Did you mean {with_suffix}?" if with_suffix.is_file() else nearest(path.stem, recipes())
        raise FileNotFoundError(f"No recipe file {name}. {advice}")
    shipped = folder() / f"{bare_name(name)}.py"
    if shipped.is_file():
        return shipped
    if Path(f"{name}.py").is_file():
        raise ValueError(f"No recipe is called {name!r}. For the file of that name here, give {name}.py.")
    raise ValueError(f"No recipe is called {name!r}. {nearest(name, recipes())} `kdtune ls` lists them.")


def find_config(name: str, recipe: str | None = None) -> Path:
    """The file of a config, given by name or as a path.

    Args:
        name: `llama3_2/8B_to_1B_KD`; or a folder of configs, which means the one in it that is named after the recipe;
            or a path to a YAML file.
        recipe: the recipe's name.

    Raises:
        ValueError: no such config, with the nearest names; a folder that has none, or several, for the recipe.
        FileNotFoundError: no such file.
    """
    is_path = name.startswith((".", "/", "~"))
    shipped = folder() / "configs" / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and not is_path and not Path(name).is_file():
        return shipped
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise FileNotFoundError(f"No config file {name}. {nearest(name, _config_names(recipe))}")
    family = folder() / "configs" / name
    if name and family.is_dir() and not is_path:
        return _of_family(name, family, recipe)
    if Path(name).is_file():
        return Path(name)
    if Path(f"{name}.yaml").is_file():
        raise ValueError(f"No config is called {name!r}. For the file of that name here, give {name}.yaml.")
    raise ValueError(f"No config is called {name!r}. {nearest(name, _config_names(recipe))} `kdtune ls` lists them.")


def find(name: str, command: str) -> Path:
    """The file of a recipe or of a config.

    Raises:
        ValueError: neither is called so, with the nearest names; or a folder of several configs.
    """
    if name.endswith(".py") or bare_name(name) in recipes():
        return find_recipe(name)
    names = [*recipes(), *_config_names(None)]
    family = folder() / "configs" / name
    known = family.is_dir() or family.with_name(f"{family.name}.yaml").is_file()
    if not known and not name.endswith((".yaml", ".yml")):
        raise ValueError(f"No recipe or config is called {name!r}. {nearest(name, names)} `kdtune ls` lists them.")
    try:
        return find_config(name)
    except ValueError as error:
        raise ValueError(f"{error} (kdtune {command} takes one file.)") from None


def launched_by(config: Path) -> str | None:
    """The recipe that a config's header names."""
    launch = _LAUNCH.search(_header(config))
    return bare_name(launch["recipe"]) if launch else None


def nearest(name: str, known: Iterable[str]) -> str:
    """What was probably meant, as a sentence."""
    names = list(known)
    by_last = {other.rpartition("/")[2].lower(): other for other in reversed(names)}
    by_last |= {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), by_last, 3) or [
        key for key in by_last if name and name.lower() in key
    ]
    found = list(dict.fromkeys(by_last[key] for key in near))[:3]
    if found:
        return f"Did you mean {' or '.join(found)}?"
    return f"There are: {', '.join(names)}." if 0 < len(names) <= 12 else ""


def _config(path: Path) -> Config:
    name = path.relative_to(folder() / "configs").with_suffix("")
    recipe = launched_by(path)
    short = name.parent if path.stem == recipe and name.parent != Path() else name
    return Config(short.as_posix(), path, _header(path).partition("\n")[0], recipe)


def _header(config: Path) -> str:
    """The comment block at the top of a YAML file, without its `#`."""
    lines = []
    with config.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("# ").rstrip())
    return "\n".join(lines)


def _of_family(name: str, family: Path, recipe: str | None) -> Path:
    names = [f"{name}/{path.stem}" for path in sorted(family.glob("*.yaml"))]
    if recipe and f"{name}/{recipe}" in names:
        return family / f"{recipe}.yaml"
    if recipe is None and len(names) == 1:
        return folder() / "configs" / f"{names[0]}.yaml"
    why = f"has none called {recipe}" if recipe else "has several"
    raise ValueError(f"The config folder {name} {why}: name one of {', '.join(names)}.")


def _config_names(recipe: str | None) -> list[str]:
    return [config.name for config in configs(recipe)] or [config.name for config in configs()]
