"""`kdtune report`: runs and evaluations as a page to look at."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kdtune.cli.parser import Parser

_DESCRIPTION = """\
Show what came out of runs, evaluations and sweeps, as one HTML file that loads nothing: which is best and by how much,
curves over each other, metrics with their errors, texts side by side, models, and the settings in which runs differ.
A run that is still going on is shown as far as it has come."""


def main(argv: Sequence[str]) -> None:
    given = arguments(argv)
    output = given.output.expanduser()
    _check_output(output)

    from kdtune import files
    from kdtune.reporting import material, page

    text = page.render(material.read([folder.expanduser() for folder in given.folders]))
    files.write(output, text.encode())
    print(f"The report is in {output}. Open it in a browser: {output.absolute().as_uri()}")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the command was called with."""
    parser = Parser("report", _DESCRIPTION)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="output_dir of a run, an evaluation or a sweep"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=Path("report.html"), help="where to write it: %(default)s"
    )
    return parser.parse_args(argv)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: give a file that ends in .html; any other could hold something else.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {output}: this must be a file in a folder that exists.")
