"""`kdtune data`: what a run with these settings would train on."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
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
    sources: list[list[str]]  # a table of those of a blend, with its header; empty if there is one source
    bins: "list[Bin]"
    lengths: str  # a line about them
    limit: str  # what stands where max_seq_len is
    warnings: list[str] = dataclasses.field(default_factory=list)


def main(argv: Sequence[str]) -> None:
    usage = f"kdtune data {recipe.USAGE} [--val] [--rows N] [--start K] [--html FILE]"
    parser = Parser("data", _DESCRIPTION, usage=usage, add_help=False)
    parser.add_argument("--val", action="store_true", help="look at dataset_val, which the run validates on, instead")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="rows to show; 0: numbers only (default: 3, on a page 20)"
    )
    parser.add_argument(
        "--start", type=int, metavar="K", help="the first row to show, from 1, in the order of the run (default: 1)"
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
        raise ValueError(
            "--val: these settings have no dataset_val, so that the run does not validate. Give "
            "dataset_val.source=..., or leave --val out to look at what it trains on."
        )
    with _warnings_last() as found:
        view = _load_and_look(module, cfg, call.options, 20 if page else 3)
        view.warnings = list(found)
        section = dataset_val if call.options.val else cfg.dataset
        view.title = f"{call.recipe.stem}: {view.title}" + (f", {section.source}" if section.source else "")
        if page is not None:
            from kdtune.cli import data_page

            page.write_text(data_page.render(view), encoding="utf-8")
            print(f"The page is in {page}.")
        else:
            from kdtune.cli import data_text

            data_text.write(view, sys.stdout)


@contextlib.contextmanager
def _warnings_last() -> Iterator[dict[str, None]]:
    """Tells each warning once and at the end, where it stays in sight; what it yields has them as soon as given."""
    found: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: found.setdefault(str(message))
        try:
            yield found
        finally:
            sys.stdout.flush()
            for message in found:
                print(f"warning: {visible(message)}", file=sys.stderr)


def _load_and_look(module: ModuleType, cfg: Any, options: argparse.Namespace, default_rows: int) -> View:
    from kdtune import data

    tokenizer = module.load_tokenizer(cfg)
    dataset_val = getattr(cfg, "dataset_val", None)
    data.trained_template(tokenizer, cfg.dataset, dataset_val)  # a run refuses templates that differ, too
    with contextlib.redirect_stdout(io.StringIO()) as said:
        loaded = module.load_data(cfg, tokenizer)
    print(visible(said.getvalue(), keep="\n"), end="")  # it may quote rows
    num_rows = default_rows if options.rows is None else options.rows
    return look(loaded, tokenizer, options.start or 1, num_rows, is_val=options.val)


def _check_options(num_rows: int | None, start: int | None, page: Path | None) -> None:
    if num_rows is not None and num_rows < 0:
        raise ValueError(f"--rows {num_rows}: give how many rows to show; 0 shows the numbers alone.")
    if start is not None and start < 1:
        raise ValueError(f"--start {start}: rows are counted from 1.")
    if start is not None and num_rows == 0:
        raise ValueError(f"--start {start} is the first row to show, and --rows 0 shows none. Leave one of them out.")
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

    from kdtune import data
    from kdtune.data import view

    loader = loaded.loader
    per_epoch = loader.steps_per_epoch  # of the first epoch; packed rows are made anew in each; None: a stream
    epochs = None if is_val or per_epoch is None else _epochs(loader, loaded.num_steps)
    examples = loaded.examples_val if is_val else loader.examples
    steps: Iterable[Sequence[data.Batch]]
    if is_val:
        num_steps = sum(map(len, loaded.val_batches.values()))
        steps = ([batch] for batch in itertools.chain.from_iterable(loaded.val_batches.values()))
    else:
        num_steps = min(per_epoch or _STREAM_STEPS, loaded.num_steps)
        steps = (loader.next_step() for _ in range(num_steps))
    bar = tqdm(steps, "batches", num_steps, unit=" steps", delay=2.0, leave=False, disable=None)
    found = view.survey(bar, examples, tokenizer, start=start, num_rows=num_rows, is_val=is_val)
    whole = "an epoch" if num_steps == per_epoch else "the run" if num_steps == loaded.num_steps else "the stream"
    span = _count(num_steps, "batch", "batches") if is_val else f"{_count(num_steps, 'step')} of {whole}"
    if num_rows and start > found.num_rows:
        raise ValueError(f"--start {start}: there are {_count(found.num_rows, 'row')} in {span}, counted from 1.")

    facts = _facts(examples, is_stream=not is_val and per_epoch is None)
    facts.append(("batches", _batches(found, span, examples.max_seq_len)))
    if not is_val:
        if per_epoch is not None and num_steps < per_epoch:
            facts[-1] = ("batches", f"{facts[-1][1]} (kdtune run tells that of a whole epoch)")
        low, middle, high = _spread(found.labels_per_step)
        facts.append(("labels per step", f"min {low:,}, median {middle:,}, max {high:,}"))
        facts.append(("steps", _steps(per_epoch, loaded.num_steps, epochs)))
    shortest, median, longest = _spread(examples.lengths)
    what = ("the first " if per_epoch is None and not is_val else "") + _count(len(examples), "example")
    return View(
        title=examples.name,
        rows=found.rows,
        facts=facts,
        sources=_sources(examples, None if epochs is None else _source_epochs(loader, epochs)),
        bins=view.histogram(examples.lengths, examples.max_seq_len),
        lengths=f"length of {what}: min {shortest:,}, median {median:,}, max {longest:,}",
        limit=f"max_seq_len {examples.max_seq_len:,}: {_limit(examples.counts)}",
    )


def _epochs(loader: Any, num_steps: int) -> float:
    """How often a run goes through its rows."""
    per_epoch = loader.steps_per_epoch
    epochs = max(1, round(num_steps / per_epoch))
    # Packed rows are made anew in each epoch, so that the epochs of a run may differ by a step.
    return epochs if loader.num_steps(epochs) == num_steps else num_steps / per_epoch


def _source_epochs(loader: Any, epochs: float) -> dict[str, float]:
    """How often a run goes through the rows of each source of a blend.

    Where a later epoch ends early, its grouping by length may make that a little more of one source or of another.
    """
    blend = loader.examples
    if epochs <= 1 or not hasattr(blend, "num_draws"):
        return dict(loader.source_epochs())  # those of the steps that were looked at
    draws = blend.num_draws(round(epochs * len(blend))).tolist()
    return {name: number / len(source) for number, (name, source) in zip(draws, blend.sources.items(), strict=True)}


def _facts(examples: Any, is_stream: bool) -> list[tuple[str, str]]:
    """The numbers of what was read."""
    counts = examples.counts
    share = examples.num_labels / examples.num_tokens
    facts = [("first rows" if is_stream else "rows", _rows(counts, len(examples)))]
    facts += [("first skipped", place) for place in counts.places[:1]]
    return [*facts, ("tokens", f"{examples.num_tokens:,}; {share:.1%} with a label, {1 - share:.1%} ignored")]


def _steps(per_epoch: int | None, in_run: int, epochs: float | None) -> str:
    if per_epoch is None or epochs is None:
        return f"{in_run:,} in the run; how many an epoch would have is not known"
    return f"{per_epoch:,} per epoch, {in_run:,} in the run ({round(epochs, 2):,} epoch{'s' * (epochs != 1)})"


def _sources(examples: Any, epochs: dict[str, float] | None) -> list[list[str]]:
    """A line for each source of a blend.

    Args:
        examples: the blend, or a single set.
        epochs: how often the run goes through each; None for validation, where each row is seen once.
    """
    sources = getattr(examples, "sources", {})
    table = [["source", "rows", "lost", "cut", "examples", "tokens", "labelled"]] * bool(sources)
    for name, source in sources.items():
        counts = source.counts
        numbers = [counts.num_rows, counts.num_lost, counts.num_truncated + counts.num_split]
        numbers += [len(source), source.num_tokens, source.num_labels]
        table.append([name, *(f"{number:,}" for number in numbers)])
    if table and epochs is not None:
        labels = [source.num_labels * epochs[name] for name, source in sources.items()]
        shares = zip(examples.weights, labels, epochs.values(), strict=True)
        columns = [[f"{share:.1%}", f"{one / sum(labels):.1%}", f"{number:.2f}"] for share, one, number in shares]
        for line, more in zip(table, [["draws", "labels", "epochs"], *columns], strict=True):
            line[1:1] = more
    return table


def _rows(counts: Any, num_examples: int) -> str:
    parts = [
        f"{counts.num_rows:,} read",
        f"{counts.num_lost:,} lost" + f" ({counts.reasons()})" * bool(counts.num_lost),
    ]
    parts.append(f"{counts.num_truncated:,} truncated")
    parts += [f"{counts.num_split:,} split"] * bool(counts.num_split)
    return f"{', '.join(parts)}; {_count(num_examples, 'example')}"


def _limit(counts: Any) -> str:
    """What became of rows longer than max_seq_len."""
    num_lost = counts.num_too_long + counts.num_prompt_too_long
    fates = ((counts.num_truncated + counts.num_split, "cut here"), (num_lost, "longer and lost"))
    return ", ".join(f"{_count(number, 'row')} {fate}" for number, fate in fates if number) or "no row is cut"


def _batches(found: Any, span: str, max_seq_len: int) -> str:
    """How full they are; of packed rows also as `kdtune run` tells it.

    A micro-batch ends with its longest row, so that packed rows have less padding than they have room left.
    """
    rows, padding = _count(found.num_rows, "row"), 1 - found.num_tokens / found.num_positions
    fill = f"{1 - padding:.1%} filled"
    if found.is_packed:
        rows += f" of {_count(found.num_documents, 'document')}"
        fill = f"{found.num_tokens / (found.num_rows * max_seq_len):.1%} of max_seq_len filled"
    return f"{rows} in {span}; {fill}, {padding:.1%} padding"


def _spread(values: Any) -> tuple[int, int, int]:
    ordered = sorted(map(int, values))
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
