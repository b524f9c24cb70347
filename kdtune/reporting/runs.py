"""What training runs leave behind, read for a report: settings, numbers of the steps, the models' sizes."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from kdtune.reporting import sizes

METRICS = "metrics.jsonl"
# Where a run is and whether it may start say nothing about what it is.
_NO_SETTING = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
# What finetune calls otherwise though it is the same number.
_SAME = {"val_loss": "val_ce_loss"}

Series = dict[int, float]  # step -> value; NaN where it was not finite


@dataclass(frozen=True)
class Run:
    """One training run, finished or not."""

    name: str
    folder: Path
    settings: dict[str, Any]  # all of them, by dotted key
    versions: dict[str, str]
    series: dict[str, Series]  # by the name in metrics.jsonl, steps in order
    student: sizes.Model | None
    teacher: sizes.Model | None
    is_finished: bool  # a model or an adapter was written
    variant: str | None = None  # of a sweep

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")

    @property
    def last_step(self) -> int:
        return max(max(series) for series in self.series.values())

    @property
    def compared(self) -> dict[str, Any]:
        """The settings that make a run what it is."""
        return {key: value for key, value in self.settings.items() if key not in _NO_SETTING}

    def last(self, key: str) -> float:
        """The newest value; NaN if there is none."""
        series = self.series.get(key)
        return list(series.values())[-1] if series else math.nan


def read_run(folder: Path, name: str, variant: str | None = None) -> Run:
    """Everything of a run but its weights.

    Args:
        folder: an output_dir with metrics.jsonl.
        name: what the report calls it.
        variant: of the sweep that it belongs to.

    Raises:
        ValueError, OSError: it is not what a training run writes; says where and what to do.
    """
    settings = dict(_flat(_mapping(folder / "config.yaml", "settings")))
    versions = folder / "versions.json"
    return Run(
        name=name,
        folder=folder,
        settings=settings,
        versions=_mapping(versions, "versions") if versions.exists() else {},
        series=_series(folder / METRICS),
        student=sizes.of_student(folder, settings),
        teacher=sizes.of_teacher(settings),
        is_finished=any((folder / result).is_dir() for result in ("model", "adapter")),
        variant=variant,
    )


def _mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML or JSON file of a run that holds keys and values."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent} has {METRICS} but no {path.name}, which every run writes before its first step: "
            f"without it the report knows no {what}. Give the output_dir of a run, as the run left it."
        )
    try:
        # The C loader takes a tenth of the time, which counts for a sweep.
        read = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}. Was it edited or cut short?") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds {type(read).__name__} where a run writes its {what}. Was it edited?")
    return read


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _series(path: Path) -> dict[str, Series]:
    """Where a step stands twice, as after two logs were put together, its last value counts."""
    *lines, _ = path.read_bytes().split(b"\n")  # a last line without an end was cut short, or is being written
    found: dict[str, Series] = {}
    for number, line in enumerate(lines, start=1):
        step, values = _line(f"{path}, line {number:,}", line)
        for key, value in values.items():
            found.setdefault(_SAME.get(key, key), {})[step] = value
    if not found:
        raise ValueError(
            f"{path} has no numbers yet: the run has not come to a step that it logs, or stopped before. "
            "Report it later, or leave it out."
        )
    return {key: dict(sorted(series.items())) for key, series in found.items()}


def _line(place: str, line: bytes) -> tuple[int, dict[str, float]]:
    damaged = "The file was changed or damaged after the run wrote it; take that line out to report the others."
    try:
        read = json.loads(line)
    except ValueError:
        raise ValueError(f"{place} is no JSON: {line[:60]!r}. {damaged}") from None
    if not isinstance(read, dict) or not isinstance(step := read.pop("step", None), int) or step < 0:
        raise ValueError(f'{place} is no object with a "step": {line[:60]!r}. {damaged}')
    for key, value in read.items():
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{place} has {value!r} for {key!r}, and a run logs numbers. {damaged}")
    return step, {key: math.nan if value is None or math.isinf(value) else value for key, value in read.items()}


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same in all runs."""

    key: str
    values: list[Any]  # of each run; MISSING where its recipe has no such setting


MISSING = "-"
GIVEN = "given"
MOST_COLOURS = 12  # groups that are told apart by colours and dashes
NUM_LOWEST = 3  # of more than that, those that have a colour beside the first


def shown(value: Any) -> str:
    """A setting as one would write it on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def differences(runs: Sequence[Run]) -> list[Difference]:
    """The settings in which runs differ, in the order of their first recipe."""
    compared = [run.compared for run in runs]
    keys = dict.fromkeys(key for one in compared for key in one)
    found = (Difference(key, [_value(one, key) for one in compared]) for key in keys)
    return [one for one in found if any(value != one.values[0] for value in one.values)]


def _value(settings: Mapping[str, Any], key: str) -> Any:
    """That of a section that is null in other runs is what it is given by."""
    if key in settings:
        return settings[key]
    return GIVEN if any(other.startswith(f"{key}.") for other in settings) else MISSING


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: list[Run]
    look: int | None = None  # its colour in all charts; None: grey, one of many

    def furthest(self, key: str) -> list[Run]:
        """The runs that have come as far as any of them; a mean with others would be of different steps."""
        ends = {run.name: max(run.series[key]) for run in self.runs if key in run.series}
        return [run for run in self.runs if ends.get(run.name, -1) == max(ends.values(), default=0)]

    def finals(self, key: str) -> list[float]:
        """The last value of each run that has come as far as any of them; NaN where it was not finite."""
        return [run.last(key) for run in self.furthest(key)]

    def mean(self, key: str) -> float:
        """Of the last values; NaN if one of them is, or if there are none."""
        values = self.finals(key)
        return fmean(values) if values else math.nan

    def end(self, key: str) -> int:
        """The step of the last value."""
        return max((max(run.series[key]) for run in self.furthest(key)), default=0)


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by their variant of a sweep, or else by their settings; in the order given.

    Runs that differ in nothing, not even the seed, are no sample of anything, and stay apart.
    A group of several runs that no sweep has named is named after the settings in which the groups differ.
    """
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        others = {key: value for key, value in run.compared.items() if key != "seed"}
        name = run.variant or json.dumps(others, default=str)
        repeat = 0
        while any(run.seed == one.seed for one in found.get((name, repeat), ())):
            repeat += 1
        found.setdefault((name, repeat), []).append(run)
    names = _names(list(found.values()))
    named = [Group(name, members) for name, members in zip(names, found.values(), strict=True)]
    looks = _looks(named)
    return [replace(group, look=looks.get(i)) for i, group in enumerate(named)]


def _looks(members: Sequence[Group]) -> dict[int, int]:
    """Colours: one for each, but of many only for the first and for those that end lowest."""
    if len(members) <= MOST_COLOURS:
        return {i: i for i in range(len(members))}
    key = next((key for key in ("val_ce_loss", "loss") if all(group.finals(key) for group in members)), None)
    means = [group.mean(key) for group in members] if key else []
    lowest = sorted((i for i, mean in enumerate(means) if not math.isnan(mean)), key=means.__getitem__)
    return {i: look for look, i in enumerate(dict.fromkeys([0, *lowest[:NUM_LOWEST]]))}


def _names(members: Sequence[Sequence[Run]]) -> list[str]:
    firsts = [group[0] for group in members]
    differ = [one for one in differences(firsts) if one.key != "seed"]
    names = []
    for i, group in enumerate(members):
        settings = ", ".join(f"{one.key}={shown(one.values[i])}" for one in differ)
        of_several = settings if 0 < len(settings) <= 60 else group[0].name
        names.append(group[0].variant or (group[0].name if len(group) == 1 else of_several))
    if len(set(names)) < len(names):
        return [group[0].name for group in members]
    short = [re.sub(r"(?<==)[^,]*/(?=[^/,]+/[^/,]+(,|$))", "", name) for name in names]  # of paths their ends
    return short if len(set(short)) == len(short) else names
