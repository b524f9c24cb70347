"""`kdtune cat`: a recipe's or a config's text, as it is shipped."""

import sys
from collections.abc import Sequence

from kdtune.cli import catalog
from kdtune.cli.parser import Parser


def main(argv: Sequence[str]) -> None:
    parser = Parser("cat", "Print a config or a recipe.")
    parser.add_argument("name", help="a config's or a recipe's name, or a path")
    path = catalog.find(parser.parse_args(argv).name, "cat")
    sys.stdout.write(path.read_text(encoding="utf-8"))
