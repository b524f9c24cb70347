"""`kdtune data`: what a run with these settings would train on."""

import contextlib
import dataclasses
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kdtune.cli import catalog, recipe
from kdtune.cli.parser import Parser
from kdtune.cli.terminal import visible

if TYPE_CHECKING:
    from kdtune.data.view import Bin, Row

_DESCRIPTION = """\
Show what a run with these settings would train on, without loading any weights: rows as the model sees them, token by
token, with those that have a label marked; numbers of the batches that it would get; and the lengths of the rows.
The settings are those of `kdtune run`."""


_STREAM_STEPS = 100  # to look at where an epoch has no end that is known


@dataclasses.dataclass
class View:
    """All that is shown, whether as text or as a page."""

    title: str
    rows: "list[Row]"
    facts: list[tuple[str, str]]
    bins: "list[Bin]"
    lengths: str  # a line about them
    limit: str  # what stands where max_seq_len is


def main(argv: Sequence[str]) -> None:
    usage = f"kdtune data {recipe.USAGE} [--val] [--rows N] [--start K] [--html FILE]"
    parser = Parser("data", _DESCRIPTION, usage=usage, add_help=False)
    parser.add_argument("--val", action="store_true", help="the rows to validate on instead (dataset_val)")
    parser.add_argument("--rows", type=int, metavar="N", help="rows to show (default: 3, on a page 20)")
    parser.add_argument(
        "--start", type=int, default=1, metavar="K", help="the first of them, from 1, as they are dealt"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at in a browser instead")
    call = recipe.parse(parser, argv)
    if call is None or call.options.help:
        parser.print_help()
        return
    page = call.options.html and call.options.html.expanduser()
    _check_options(call.options.rows, call.options.start, page)
    module = recipe.load_module(call.recipe)
    _check_reads_data(module, call)
    cfg = recipe.settings(module, call)
    dataset_val: Any = getattr(cfg, "dataset_val", None)
    if call.options.val and dataset_val is None:
        raise ValueError("--val: these settings have no dataset_val, so that a run would not validate.")
    warnings.formatwarning = lambda message, *_: f"warning: {visible(str(message))}\n"

    from kdtune import data

    num_rows = call.options.rows if call.options.rows is not None else 20 if page else 3
    tokenizer = module.load_tokenizer(cfg)
    data.trained_template(tokenizer, cfg.dataset, dataset_val)  # a run refuses templates that differ, too
    with contextlib.redirect_stdout(io.StringIO()) as said:
        loaded = module.load_data(cfg, tokenizer)
    print(visible(said.getvalue(), keep="\n"), end="")  # it may quote rows
    view = look(loaded, tokenizer, call.options.start, num_rows, is_val=call.options.val)
    section = dataset_val if call.options.val else cfg.dataset
    view.title = f"{call.recipe.stem}: {view.title}" + (f", {section.source}" if section.source else "")
    if page is not None:
        from kdtune.cli import data_page

        page.write_text(data_page.render(view), encoding="utf-8")
        print(f"The page is in {page}.")
    else:
        from kdtune.cli import data_text

        data_text.write(view, sys.stdout)


def _check_options(num_rows: int | None, start: int, page: Path | None) -> None:
    if num_rows is not None and num_rows < 0:
        raise ValueError(f"--rows {num_rows}: give how many rows to show; 0 shows the numbers alone.")
    if start < 1:
        raise ValueError(f"--start {start}: rows are counted from 1.")
    if page is None:
        return
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html {page}: give a file that ends in .html; any other could hold something else.")
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise FileNotFoundError(f"--html {page}: this must be a file in a folder that exists.")


def _check_reads_data(module: ModuleType, call: recipe.Call) -> None:
    """Refuse recipes that train on nothing."""
    lacking = [name for name in ("load_tokenizer", "load_data") if not callable(getattr(module, name, None))]
    if not lacking:
        return
    keys = {field.name for field in dataclasses.fields(module.Config)}
    if "dataset" not in keys:
        raise ValueError(f"{call.recipe.stem} reads no data set, so there is nothing to look at.")
    raise ValueError(
        f"{call.recipe} has no {' and no '.join(lacking)}: they tell kdtune data what the recipe reads. "
        f"See {catalog.folder() / 'finetune.py'}."
    )


def look(loaded: Any, tokenizer: Any, start: int, num_rows: int, *, is_val: bool) -> View:
    """Go through the batches of an epoch, or through the first of a stream.

    Args:
        loaded: RunData, what the recipe's load_data returns.
        tokenizer: to spell the rows.
        start: the first row to show, from 1.
        num_rows: how many to show.
        is_val: the validation rows instead.

    Raises:
        ValueError: there is no such row.
    """
    from tqdm import tqdm

    from kdtune.data import view

    loader = loaded.loader
    per_epoch = loader.steps_per_epoch  # of the first epoch; packed rows are made anew in each; None: a stream
    examples = loaded.examples_val if is_val else loader.examples
    val_batches = [batch for batches in loaded.val_batches.values() for batch in batches]
    num_steps = len(val_batches) if is_val else min(per_epoch or _STREAM_STEPS, loaded.num_steps)
    steps = ([batch] for batch in val_batches) if is_val else (loader.next_step() for _ in range(num_steps))
    bar = tqdm(steps, "batches", num_steps, unit=" steps", delay=2.0, leave=False, disable=None)
    found = view.survey(bar, examples, tokenizer, start=start, num_rows=num_rows, is_val=is_val)
    whole = "an epoch" if num_steps == per_epoch else "the run" if num_steps == loaded.num_steps else "the stream"
    span = _count(num_steps, "batch", "batches") if is_val else f"{_count(num_steps, 'step')} of {whole}"
    if num_rows and start > found.num_rows:
        raise ValueError(f"--start {start}: there are {_count(found.num_rows, 'row')} in {span}.")

    shortest, median, longest = _spread(examples.lengths)
    what = ("the first " if per_epoch is None and not is_val else "") + _count(len(examples), "example")
    return View(
        title=examples.name,
        rows=found.rows,
        facts=_facts(examples, found, span, None if is_val else (per_epoch, loaded.num_steps)),
        bins=view.histogram(examples.lengths, examples.max_seq_len),
        lengths=f"length of {what}: min {shortest:,}, median {median:,}, max {longest:,}",
        limit=f"max_seq_len {examples.max_seq_len:,}: {_limit(examples.counts)}",
    )


def _facts(examples: Any, found: Any, span: str, run: tuple[int | None, int] | None) -> list[tuple[str, str]]:
    """The numbers.

    Args:
        examples: what was read.
        found: the batches that were looked at.
        span: which these are.
        run: steps of an epoch (None: a stream) and of the run; None for validation.
    """
    counts = examples.counts
    share = examples.num_labels / examples.num_tokens
    is_stream = run is not None and run[0] is None
    facts = [("first rows" if is_stream else "rows", _rows(counts, len(examples)))]
    if counts.skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.skipped.items()))
        facts.append(("skipped", f"{kinds}; the first: {counts.places[0]}"))
    facts.append(("tokens", f"{examples.num_tokens:,}; {share:.1%} with a label, {1 - share:.1%} ignored"))
    if run is None:
        return [*facts, ("batches", _batches(found, span))]
    per_epoch, in_run = run
    steps = f"{in_run:,} in the run; how many an epoch would have is not known"
    if per_epoch is not None:
        epochs = f"{in_run / per_epoch:.2g}"
        steps = f"{per_epoch:,} per epoch, {in_run:,} in the run ({epochs} epoch{'s' * (epochs != '1')})"
    low, middle, high = _spread(found.labels_per_step)
    other = " (kdtune run tells that of a whole epoch)"
    return [
        *facts,
        ("batches", _batches(found, span) + other * (per_epoch is not None and in_run < per_epoch)),
        ("labels per step", f"min {low:,}, median {middle:,}, max {high:,}"),
        ("steps", steps),
    ]


def _rows(counts: Any, num_examples: int) -> str:
    parts = [f"{counts.num_rows:,} read", f"{counts.num_dropped + counts.num_too_long:,} dropped"]
    parts.append(f"{counts.num_truncated:,} truncated")
    parts += [f"{counts.num_split:,} split"] * bool(counts.num_split)
    parts += [f"{counts.num_skipped:,} skipped"] * bool(counts.num_skipped)
    return f"{', '.join(parts)}; {_count(num_examples, 'example')}"


def _limit(counts: Any) -> str:
    """What became of rows longer than max_seq_len."""
    fates = ((counts.num_truncated + counts.num_split, "cut here"), (counts.num_too_long, "longer and dropped"))
    return ", ".join(f"{_count(number, 'row')} {fate}" for number, fate in fates if number) or "no row is cut"


def _batches(found: Any, span: str) -> str:
    """How full they are. `kdtune run` tells it of a whole epoch, and of packed rows as a part of max_seq_len."""
    rows, up_to = _count(found.num_rows, "row"), ""
    if found.num_documents != found.num_rows:
        rows += f" of {_count(found.num_documents, 'document')}"
        up_to = " up to the longest row of each micro-batch"
    fill = found.num_tokens / found.num_positions
    return f"{rows} in {span}; these are {fill:.1%} filled{up_to}, {1 - fill:.1%} padding"


def _spread(values: Any) -> tuple[int, int, int]:
    ordered = sorted(map(int, values))
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
