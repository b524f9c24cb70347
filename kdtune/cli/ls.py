"""`kdtune ls`: the recipes, and under each its configs."""

import shutil
import sys
from collections.abc import Sequence

from kdtune.cli import catalog
from kdtune.cli.parser import Parser


def main(argv: Sequence[str]) -> None:
    parser = Parser("ls", "List the recipes and their configs.")
    parser.add_argument("recipe", nargs="?", help="only this one")
    recipe = parser.parse_args(argv).recipe
    names = catalog.recipes() if recipe is None else [catalog.find_recipe(recipe).stem]
    configs = {name: catalog.configs(name) for name in names}
    width = max((len(config.name) for group in configs.values() for config in group), default=0)

    for name in names:
        _print_line(name, catalog.title(catalog.find_recipe(recipe or name)))
        for config in configs[name]:
            _print_line(f"    {config.name:<{width}}", config.title)
        print()
    print("Run one:    kdtune run <recipe> --config <config> [key=value ...]")
    print("Change one: kdtune cp <recipe | config> <to>")


def _print_line(name: str, title: str) -> None:
    line = f"{name}  {title}".rstrip()
    width = shutil.get_terminal_size().columns
    # Whole lines for a file or a pipe; on a terminal the table keeps its shape.
    print(f"{line[: width - 3]}..." if sys.stdout.isatty() and len(line) > width else line)
