"""`kdtune validate`: does a config fit its recipe?"""

from collections.abc import Sequence

from kdtune.cli import recipe
from kdtune.cli.parser import Parser

_DESCRIPTION = """\
Check the settings against a recipe: known, of the right type, in range, none missing. No file that they name is opened;
`kdtune run ... --dry-run` does that."""


def main(argv: Sequence[str]) -> None:
    parser = Parser("validate", _DESCRIPTION, usage=f"kdtune validate {recipe.USAGE}", add_help=False)
    call = recipe.parse(parser, argv)
    if call is None or call.options.help:
        parser.print_help()
        return
    recipe.settings(recipe.load_module(call.recipe), call)
    print(f"{call.config or 'The settings'}: valid for {call.recipe.stem}.")
