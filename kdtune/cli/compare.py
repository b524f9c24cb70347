"""`kdtune compare`: whether models are better than a baseline, by what `kdtune run evaluate` wrote of them."""

import argparse
import dataclasses
from collections.abc import Sequence

from kdtune.cli.parser import Parser
from kdtune.cli.terminal import visible

_DESCRIPTION = """\
Compare evaluations of the same examples: the metrics of each, their differences to the first, and the 95% interval of
each difference, by paired bootstrap over examples. A model is called better or worse where that leaves out 0."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = Parser("compare", _DESCRIPTION)
    parser.add_argument("baseline", help="folder that kdtune run evaluate wrote: what the others are compared with")
    parser.add_argument("others", nargs="+", metavar="other", help="folders of other models, on the same examples")
    parser.add_argument("--resamples", type=int, metavar="N", help="draws of the bootstrap (default: 10,000)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    if options.resamples is not None and options.resamples < 100:
        raise ValueError(
            f"--resamples {options.resamples}: the ends of a 95% interval need at least 100, better 10,000."
        )
    return options


def main(argv: Sequence[str]) -> None:
    options = arguments(argv)
    from kdtune.evaluation import comparing, results

    found = [
        comparing.compare(options.baseline, other, num_resamples=options.resamples or comparing.NUM_RESAMPLES)
        for other in options.others
    ]
    if options.json:
        print(results.dumps([dataclasses.asdict(one) for one in found], indent=2))
        return
    for one in found:
        print(f"\n{visible(one.other)}, with {visible(one.baseline)} as the baseline:\n")
        print(visible(comparing.table(one), keep="\n"))
        for line in (*(f"left out: {left_out}" for left_out in one.left_out), *one.caveats):
            print(f"\n{visible(line)}")
