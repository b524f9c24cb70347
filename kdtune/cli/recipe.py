"""From the arguments of `kdtune run` to a recipe's module and its settings. Mistakes in names and forms come first:
they are found without importing the recipe, and so without waiting for torch."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kdtune.cli import catalog
from kdtune.cli.parser import Parser

USAGE = "<recipe | file.py> [--config <name | file.yaml>] [key=value ...]"


@dataclasses.dataclass(frozen=True)
class Call:
    """What was asked for, with names already found."""

    name: str  # of the recipe, as given
    recipe: Path
    config: Path | None
    overrides: list[str]
    options: argparse.Namespace


def parse(parser: Parser, argv: Sequence[str]) -> Call | None:
    """Read the arguments of a command that takes a recipe, a config and overrides in any order after the recipe.

    Returns:
        None if help on the command itself, not on a recipe, was asked for.

    Raises:
        ValueError: no recipe, an unknown recipe or config, an argument that is neither option nor key=value.
        FileNotFoundError: a path to a file that is not there.
    """
    parser.add_argument("--config", action="append", metavar="<name | file.yaml>", help="the settings to start from")
    parser.add_argument("-h", "--help", action="store_true", help="with a recipe: list every setting of it")
    options, rest = parser.parse_known_args(argv)
    if not rest and options.help:
        return None
    if not rest or rest[0].startswith("-"):
        what = f"{rest[0]} is no option of {parser.prog}, and no recipe is named" if rest else "no recipe is named"
        if rest and (near := parser.nearest_option(rest[0])):
            raise ValueError(f"{what}. Did you mean {near}?")
        raise ValueError(f"{what}: {parser.prog} {USAGE}. `kdtune ls` lists the recipes.")
    recipe = catalog.find_recipe(rest[0])
    if len(options.config or []) > 1:
        raise ValueError(f"--config is given {len(options.config)} times; what to change goes into key=value.")
    config = catalog.find_config(options.config[0], catalog.bare_name(recipe.stem)) if options.config else None
    if not options.help:
        from kdtune.config import split_overrides

        for argument in rest[1:]:
            if advice := _meant(parser, argument, catalog.bare_name(recipe.stem)):
                raise ValueError(f"{argument!r} is no setting: settings are given as key=value. Did you mean {advice}?")
        split_overrides(rest[1:])
    return Call(rest[0], recipe, config, rest[1:], options)


def _meant(parser: Parser, argument: str, recipe: str) -> str | None:
    """The option that an argument, which is none and no setting, was probably meant to be."""
    if argument.startswith("--"):
        return parser.nearest_option(argument)
    if "=" in argument or argument.startswith("-"):
        return None
    try:
        catalog.find_config(argument, recipe)
    except (ValueError, OSError):
        return None
    return f"--config {argument}"


def load_module(path: Path) -> ModuleType:
    """Import a recipe from its file.

    It goes into sys.modules, where dataclasses look up annotations, under a name that no other module has: a recipe
    called `random.py` hides nothing.

    Raises:
        ValueError: the file is not a recipe.
    """
    name = f"kdtune_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if path.parent != catalog.folder() and str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # a copied recipe may have modules of its own beside it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    lacking = [what for what in ("main", "check") if not callable(getattr(module, what, None))]
    if not (isinstance(getattr(module, "Config", None), type) and dataclasses.is_dataclass(module.Config)):
        lacking.insert(0, "Config")
    if lacking:
        raise ValueError(
            f"{path} is no recipe: it has no {' and no '.join(lacking)}. A recipe is a file with a dataclass Config, "
            "main(cfg), and check(cfg) for what can be found out before anything is loaded."
        )
    return module


def settings(module: ModuleType, call: Call) -> Any:
    """The recipe's Config with the values of this call.

    Raises:
        ValueError: see `kdtune.config.load`.
    """
    from kdtune import config

    try:
        return config.load(module.Config, call.config, call.overrides)
    except ValueError as error:
        written_for = catalog.launched_by(call.config) if call.config else None
        if written_for in (None, catalog.bare_name(call.recipe.stem)) or call.recipe.parent != catalog.folder():
            raise
        raise ValueError(f"{error}\n{call.config} is written for the recipe {written_for}.") from error
