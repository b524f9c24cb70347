"""`kdtune sweep`: a recipe with every combination of some values, and one table of how the runs ended."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import queue
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from kdtune.cli import launch, recipe
from kdtune.cli.parser import Parser
from kdtune.evaluation import results

_DESCRIPTION = """\
Run a recipe once for each combination of the values that are separated by commas:

    kdtune sweep knowledge_distillation --config quickstart kd_ratio=0,0.5,1 seed=0,1,2 output_dir=runs/ratios

Each run is `kdtune run` with a folder of its own in output_dir. At the end there is one table, with mean and standard
deviation over `seed` if that is among the values; output_dir/sweep.md keeps it. The same call again goes on where it
was stopped, and with more values adds runs. A comma inside brackets, braces or quotes separates nothing."""

_VALIDATION = ("val_ce_loss", "val_loss", "val_kd_loss", "val_agreement")  # of the last validation
_LOSSES = ("loss", "ce_loss", "kd_loss")  # of a run without one
_LINES = 5  # of the log of a run that failed
_UNFIT = re.compile(r"[^\w.+-]+")  # for the name of a folder
SEED = "seed"  # the axis over which results are averaged


def main(argv: Sequence[str]) -> None:
    usage = f"kdtune sweep {recipe.USAGE.replace('key=value', 'key=value[,value...]')}"
    parser = Parser("sweep", _DESCRIPTION, usage=usage, add_help=False)
    parser.add_argument("--dry-run", action="store_true", help="check the settings of all runs, list them, run none")
    parser.add_argument("--jobs", type=_at_least_one, metavar="N", help="runs at the same time; 1 unless given")
    parser.add_argument("--devices", type=_names, metavar="NAME,...", help="one run at a time on each: cuda:0,cuda:1")
    launch.add_options(parser)
    call = recipe.parse(parser, argv)
    if call is None or call.options.help:
        parser.print_help()
        return
    axes, fixed = _split(call.overrides)
    module = recipe.load_module(call.recipe)
    places = _places(call)
    sweep = _plan(module, call, axes, fixed)
    print(f"{len(sweep.runs)} runs of {call.name} in {sweep.folder}, {sum(run.is_done for run in sweep.runs)} done")
    if call.options.dry_run:
        print("\n".join(["", *(f"{run.name:<40} {run.state}" for run in sweep.runs), ""]))
        print("Dry run: the settings of all are in order, nothing was run.")
        return
    sweep.folder.mkdir(parents=True, exist_ok=True)
    sweep.write()
    _run_all(sweep, places, launch.options(call))
    table = sweep.table()
    (sweep.folder / "sweep.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nThe table is in {sweep.folder / 'sweep.md'}. All runs as a page:")
    print(f"  kdtune report {sweep.folder}")
    if failed := [run.name for run in sweep.runs if run.state == "failed"]:
        print(f"kdtune: {len(failed)} of {len(sweep.runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


@dataclasses.dataclass
class Run:
    """One combination.

    Attributes:
        name: of its folder, and of its log in `logs`.
        values: of each axis, as they were given.
        overrides: all that `kdtune run` gets but output_dir.
        config: a hash of the config's text; with `overrides` it tells a run of other settings.
        state: `done` and `failed` are final until the sweep is called again.
        seconds: that it took.
    """

    name: str
    values: dict[str, str]
    overrides: list[str]
    config: str
    state: str = "waiting"
    seconds: float | None = None

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    @property
    def variant(self) -> tuple[str, ...]:
        """What it has in common with the runs of other seeds."""
        return tuple(value for key, value in self.values.items() if key != SEED)


@dataclasses.dataclass
class Sweep:
    """All runs, as `sweep.json` in their folder holds them."""

    folder: Path
    recipe: str  # as it was given
    config: str | None
    axes: list[str]
    runs: list[Run]
    resumes: bool  # the recipe can go on from a checkpoint
    overwrites: bool  # the recipe refuses a folder that has something, unless told

    def take_over_what_is_done(self) -> None:
        """Let the runs that an earlier call has finished be finished.

        Raises:
            ValueError: one of them had other settings, or the sweep was over others.
        """
        path = self.folder / "sweep.json"
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["kdtune_sweep"] != 1:
                raise ValueError(f"version {found['kdtune_sweep']}")
            axes, earlier = found["axes"], {run["name"]: Run(**run) for run in found["runs"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}), and without it nobody knows which runs are finished. Take another "
                "output_dir, or delete it to run all of them again."
            ) from None
        if axes != self.axes:
            raise ValueError(
                f"{self.folder} has a sweep over {', '.join(axes)}, this one is over {', '.join(self.axes)}: one table "
                "cannot show both. Take another output_dir."
            )
        for run in self.runs:
            before = earlier.pop(run.name, None)
            if before is None or not before.is_done:
                continue
            if (before.overrides, before.config) != (run.overrides, run.config):
                raise ValueError(
                    f"{self.folder / run.name} is there from a run with other settings: its result would stand in the "
                    f"table beside those of these settings. Take another output_dir, or delete {self.folder}."
                )
            run.state, run.seconds = before.state, before.seconds
        # Runs of values that this call does not name stay in the table.
        self.runs += [run for run in earlier.values() if run.is_done]

    def write(self) -> None:
        """Replace `sweep.json`."""
        content = {
            "kdtune_sweep": 1,
            "recipe": self.recipe,
            "config": self.config,
            "axes": self.axes,
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }
        aside = self.folder / "sweep.json.tmp"
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.folder / "sweep.json")

    def command(self, run: Run, options: Sequence[str], device: str | None) -> list[str]:
        """The `kdtune run` of one of them."""
        folder = self.folder / run.name
        words = ["run", *options, self.recipe, *(["--config", self.config] if self.config else [])]
        words += run.overrides
        words += [f"device={device}"] if device else []
        if self.resumes and any((folder / "checkpoints").glob("*")):
            words.append("resume_from_checkpoint=true")
        elif self.overwrites:
            words.append("overwrite_output_dir=true")
        return [sys.executable, "-m", "kdtune", *words, f"output_dir={folder}"]

    def table(self) -> str:
        """Markdown: a line for each variant, in the order of the runs."""
        numbers = {run.name: _shown(self.folder / run.name) for run in self.runs if run.is_done}
        shown = dict.fromkeys(key for values in numbers.values() for key in values)
        groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
        for run in self.runs:
            groups.setdefault(run.variant, []).extend([numbers[run.name]] if run.is_done else [])
        axes = [axis for axis in self.axes if axis != SEED]
        lines = [[*axes, "runs", *shown]]
        for variant, group in groups.items():
            cells = [spread([values[key] for values in group if key in values]) for key in shown]
            lines.append([*variant, str(len(group)), *cells])
        return results.markdown(lines, left=range(len(axes))) + "\n"


def last_values(folder: Path) -> dict[str, float]:
    """The last value of each number in a run's `metrics.jsonl`, NaN if it was not finite; none without such a file."""
    path = folder / "metrics.jsonl"
    values: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        values |= {key: math.nan if value is None else value for key, value in json.loads(line).items()}
    return values


def _shown(folder: Path) -> dict[str, float]:
    """What tells runs apart: the main metrics of an evaluation, the last validation; without either the last losses."""
    values, found = last_values(folder), dict[str, float]()
    if (folder / results.MAIN).exists():
        for one in (one for one in results.read(folder).results if one.subset is None):
            found |= {f"{one.task} {name}": one.metrics[name].value for name in results.main_metrics(one)}
    found |= {key: values[key] for key in _VALIDATION if key in values}
    return found or {key: values[key] for key in _LOSSES if key in values}


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation, with as many digits as it makes sense to print of them."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return f"{mean:.4f}"
    deviation = statistics.stdev(values)
    digits = 4 if deviation == 0 else min(max(1 - math.floor(math.log10(deviation)), 0), 6)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _run_all(sweep: Sweep, places: Sequence[str | None], options: Sequence[str]) -> None:
    """Run what is not done, as many at a time as there are places."""
    (sweep.folder / "logs").mkdir(exist_ok=True)
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for place in places:
        free.put(place)
    environment = dict(os.environ)
    # Runs side by side would otherwise each take all cores.
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // len(places), 1)))

    def do(run: Run) -> Run:
        place, started = free.get(), time.perf_counter()
        with (sweep.folder / "logs" / f"{run.name}.log").open("w") as log:
            command = sweep.command(run, options, place)
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        free.put(place)
        run.state, run.seconds = "failed" if done.returncode else "done", round(time.perf_counter() - started, 1)
        return run

    waiting = [run for run in sweep.runs if not run.is_done]
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            for count, future in enumerate(as_completed([pool.submit(do, run) for run in waiting]), 1):
                run = future.result()
                sweep.write()
                print(f"{count}/{len(waiting)}  {run.name}  {_outcome(sweep, run)}", flush=True)
        except KeyboardInterrupt:
            # Those at work got it, too: they save if they can.
            pool.shutdown(cancel_futures=True)
            raise


def _outcome(sweep: Sweep, run: Run) -> str:
    if run.is_done:
        numbers = _shown(sweep.folder / run.name).items()
        return ", ".join([f"{run.seconds:.0f} s", *(f"{key} {value:.4f}" for key, value in numbers)])
    log = sweep.folder / "logs" / f"{run.name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LINES:]
    return "\n".join([f"failed: {log}", *(f"    {line}" for line in lines)])


# What was asked for.


def _plan(module: Any, call: recipe.Call, axes: Mapping[str, Sequence[str]], fixed: Sequence[tuple[str, str]]) -> Sweep:
    """Check the settings of each combination, and find what an earlier call has done.

    Raises:
        ValueError: settings that do not fit the recipe, or a finished run of the same name that had others.
    """
    fields = {field.name for field in dataclasses.fields(module.Config)}
    if "output_dir" not in fields:
        raise ValueError(f"{call.name} has no output_dir, so a sweep could not tell its runs apart.")
    if not axes:
        raise ValueError(
            "No setting has several values, so there is one run: `kdtune run` does that. Give values with commas "
            "between them, such as kd_ratio=0,0.5,1."
        )
    if "output_dir" in axes:
        raise ValueError("output_dir is the folder of the whole sweep: give one, each run gets a folder in it.")
    text = hashlib.blake2b(call.config.read_bytes() if call.config else b"", digest_size=8).hexdigest()
    runs, folder = [], Path()
    named: dict[str, str] = {}  # by what the settings come to
    for name, values in _combinations(axes):
        overrides = [f"{key}={value}" for key, value in [*fixed, *values.items()]]
        cfg = recipe.settings(module, dataclasses.replace(call, overrides=overrides))
        folder = Path(cfg.output_dir)
        if (other := named.setdefault(repr(cfg), name)) != name:
            raise ValueError(f"{other} and {name} are the same settings: the second run would be the first again.")
        overrides = [override for override in overrides if not override.startswith("output_dir=")]
        runs.append(Run(name, values, overrides, text))
    sweep = Sweep(
        *(folder, call.name, (call.options.config or [None])[0], list(axes), runs),
        resumes="resume_from_checkpoint" in fields,
        overwrites="overwrite_output_dir" in fields,
    )
    sweep.take_over_what_is_done()
    return sweep


def _split(overrides: Iterable[str]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Settings with several values, and those with one."""
    from kdtune.config import split_overrides

    axes: dict[str, list[str]] = {}
    fixed: list[tuple[str, str]] = []
    for key, text in split_overrides(list(overrides)):
        values = split_values(text)
        if key in axes or (len(values) > 1 and key in dict(fixed)):
            raise ValueError(f"{key} is given twice: put all of its values into one, separated by commas.")
        if len(values) > 1:
            axes[key] = values
        else:
            fixed.append((key, text))
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"{key} has the value {twice} twice: the second run would be the first again.")
    return axes, fixed


def split_values(text: str) -> list[str]:
    """At the commas that are in no brackets, braces or quotes."""
    values, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "[{(") - (char in "]})") if not quote else 0
        if char == "," and depth <= 0 and not quote:
            values.append("")
        else:
            values[-1] += char
    return [value.strip() for value in values] if len(values) > 1 else [text]


def _combinations(axes: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and values of each, the last axis fastest."""
    short = {key: key.rpartition(".")[2] for key in axes}
    labels = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    taken: set[str] = set()
    for values in itertools.product(*axes.values()):
        named = dict(zip(axes, values, strict=True))
        # The end of a path says more than its start. File systems end names at 255 bytes.
        texts = {key: _UNFIT.sub("_", value)[-40:].strip("_") for key, value in named.items()}
        name = ",".join(f"{labels[key]}={text}" for key, text in texts.items())[:200]
        if name in taken:
            name = f"{name},{len(taken)}"
        taken.add(name)
        yield name, named


def _places(call: recipe.Call) -> list[str | None]:
    devices, jobs = call.options.devices, call.options.jobs
    if devices and jobs:
        raise ValueError("--devices runs one at a time on each of them, which is as many as --jobs says: give one.")
    if devices and any(override.startswith("device=") for override in call.overrides):
        raise ValueError("--devices says where each run goes, and device= says it of all of them: give one.")
    return devices or [None] * (jobs or 1)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, at least 1")
    return int(text)


def _names(text: str) -> list[str | None]:
    names: list[str | None] = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("wants devices, each once, separated by commas")
    return names
