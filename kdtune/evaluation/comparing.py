"""Whether one model is better than another: paired bootstrap over examples. No torch is needed.

Both models were given the same examples, and what is hard for one is mostly hard for the other. So examples are drawn
with replacement, as many as there are, and the metrics of both models are computed of the same draws, as the ratios of
sums that they are. Over many draws, their difference varies as it would from one set of examples to the next (Efron and
Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3, percentile interval; Koehn 2004, "Statistical
Significance Tests for Machine Translation Evaluation"). A difference is shown where the 95% interval leaves out 0.

It is one over examples, not over trainings: with another seed the same recipe gives another model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kdtune.evaluation.estimates import DEFINITIONS, Additions
from kdtune.evaluation.results import Evaluation, Example, Metric, markdown, read, read_examples, rounded

LEVEL = 0.95
NUM_RESAMPLES = 10_000
FEW = 50  # examples; of 4 a percentile interval holds the true difference in 80% of the cases, of 20 in 93%
_OF_TEACHER = {name for name in DEFINITIONS if name.startswith("teacher_")}  # which is the same for both
_AT_A_TIME = 2**22  # numbers of draws that exist at one time

Verdict = Literal["better", "worse", "higher", "lower", "no difference shown"]


@dataclass(frozen=True)
class Difference:
    """A metric of two models on the same examples.

    Attributes:
        task: as of `Result`, like the next one.
        subset: None: all examples of the task.
        metric: its name.
        unit: as of `Metric`.
        num_examples: how many there are.
        baseline: value of the first model.
        value: of the other one.
        difference: value - baseline.
        low: lower end of its interval; NaN of a single example.
        high: the upper one.
        verdict: of the other model; higher or lower where neither is better.
    """

    task: str
    subset: str | None
    metric: str
    unit: str
    num_examples: int
    baseline: float
    value: float
    difference: float
    low: float
    high: float
    verdict: Verdict

    @property
    def examples(self) -> str:
        """Which they are: the task, and its subset if it has one."""
        return self.task if self.subset is None else f"{self.task}: {self.subset}"


@dataclass(frozen=True)
class Comparison:
    """Two evaluations.

    Attributes:
        baseline: folder of the first.
        other: of the other.
        differences: of the metrics that both have, but for those of the teacher alone.
        left_out: what only one of them has, in words.
        caveats: what forbids to rely on a verdict, or to lay it to the models alone, in words.
    """

    baseline: str
    other: str
    differences: list[Difference]
    left_out: list[str]
    caveats: list[str]


def compare(
    baseline: str | Path, other: str | Path, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare the evaluation of a model with that of a baseline.

    Args:
        baseline: folder of an evaluation.
        other: another.
        num_resamples: draws of the bootstrap, > 0.
        seed: of the draws, >= 0.

    Raises:
        FileNotFoundError, ValueError: a folder holds no evaluation; or they are of other examples, or beside another
            teacher, so that their numbers cannot be compared.
    """
    folders = str(baseline), str(other)
    evaluations = [read(folder) for folder in folders]
    _check_teachers(folders, evaluations)
    examples = [_by_task(folder) for folder in folders]
    shared = [task for task in examples[0] if task in examples[1]]
    if not shared:
        listed = " and ".join(f"{folder} ({', '.join(one)})" for folder, one in zip(folders, examples, strict=True))
        raise ValueError(f"{listed} have no task in common, so there is nothing to compare. Evaluate both on the same.")
    left_out = [
        f"{task}: not in {folder}"
        for folder, mine, theirs in zip(folders, examples, examples[::-1], strict=True)
        for task in theirs
        if task not in mine
    ]
    differences: list[Difference] = []
    for task in shared:
        pair = _pair(task, folders, evaluations, [one[task] for one in examples])
        names = [{*one[0].sums, *one[0].values} for one in pair]
        for folder, mine, theirs in zip(folders, names, names[::-1], strict=True):
            if lacking := sorted(theirs - mine):
                left_out.append(f"{', '.join(lacking)} of {task}: not in {folder}")
        subsets = dict.fromkeys(one.subset for one in pair[0])
        for subset in (None, *(subsets if len(subsets) > 1 else ())):
            which = [i for i, one in enumerate(pair[0]) if subset in (None, one.subset)]
            sets = [[one[i] for i in which] for one in pair]
            known = _metrics(evaluations, task)
            differences += _differences(task, subset, sets, known, num_resamples, seed)
    caveats = [line for task in shared if (line := _other_settings(task, evaluations))] + _too_few(differences)
    return Comparison(*folders, differences, left_out, caveats)


def table(comparison: Comparison) -> str:
    """All differences as a table in markdown."""
    rows = [["task", "metric", "baseline", "value", "difference", f"{LEVEL:.0%} interval", "verdict"]]
    for one in comparison.differences:
        error = (one.high - one.low) / 4  # about a standard error, which says how many digits mean something
        values = [rounded(value, error)[0] for value in (one.baseline, one.value)]
        difference, low, high = (
            f"{value:+{_digits(one.value, error)}}" for value in (one.difference, one.low, one.high)
        )
        rows.append([one.examples, one.metric, *values, difference, f"{low} to {high}", one.verdict])
    return markdown(rows, left=(0, 1, 6))


def _digits(value: float, error: float) -> str:
    decimals = rounded(value, error)[0].partition(".")[2]
    return f".{len(decimals)}f" if error > 0 else ".2g"


def _check_teachers(folders: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    teachers = [(folder, one.teacher) for folder, one in zip(folders, evaluations, strict=True) if one.teacher]
    if len({(one.fingerprint, one.dtype, one.quantization) for _, one in teachers}) > 1:
        told = " and ".join(
            f"{folder} beside {one.name} ({', '.join(filter(None, (one.dtype, one.quantization)))})"
            for folder, one in teachers
        )
        raise ValueError(
            f"{told} were evaluated beside different teachers, so that their distances to it cannot be compared. "
            "Evaluate both beside the same one, or without."
        )


def _other_settings(task: str, evaluations: Sequence[Evaluation]) -> str:
    """In which settings of a task both differ; empty if in none."""
    first, second = (one.settings.get(task, {}) for one in evaluations)
    pairs = {name: (first.get(name, "unknown"), second.get(name, "unknown")) for name in first | second}
    differ = [f"{name} {ours}, here {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if not differ:
        return ""
    return f"{task} with other settings ({'; '.join(differ)}): a difference may come from these and not from the models"


def _too_few(differences: Sequence[Difference]) -> list[str]:
    few = dict.fromkeys(f"{one.examples}: {one.num_examples}" for one in differences if one.num_examples < FEW)
    why = f"intervals of fewer than {FEW} examples are too narrow ({', '.join(few)}): do not rely on such a verdict"
    return [why] if few else []


def _by_task(folder: str) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = defaultdict(list)
    for one in read_examples(folder):
        found[one.task].append(one)
    return found


def _pair(
    task: str, folders: Sequence[str], evaluations: Sequence[Evaluation], examples: Sequence[list[Example]]
) -> tuple[list[Example], list[Example]]:
    """The same examples of both, in the same order."""
    first, second = examples
    counts = [Counter(map(_key, one)) for one in examples]
    if counts[0] != counts[1]:
        both = (counts[0] & counts[1]).total()
        is_tokenizer = evaluations[0].tokenizer != evaluations[1].tokenizer
        why = "their tokenizers differ, too" if is_tokenizer else "by their tokens and labels"
        raise ValueError(
            f"{task}: {folders[0]} has {len(first):,} examples, {folders[1]} {len(second):,}, and {both:,} of them are "
            f"the same ({why}). Only results of the same examples can be compared: evaluate both with the same data "
            "settings and tokenizer."
        )
    # Sorted, so that draws do not depend on the order of the rows.
    return sorted(first, key=_key), sorted(second, key=_key)


def _key(example: Example) -> tuple[str, str]:
    return example.subset or "", example.id


def _metrics(evaluations: Sequence[Evaluation], task: str) -> dict[str, Metric]:
    """What is said of each metric of a task."""
    return {
        name: metric for one in evaluations for r in one.results if r.task == task for name, metric in r.metrics.items()
    }


def _differences(
    task: str,
    subset: str | None,
    sets: Sequence[list[Example]],
    known: dict[str, Metric],
    num_resamples: int,
    seed: int,
) -> Iterator[Difference]:
    additions = [Additions(one) for one in sets]
    values = [one.metrics(one.columns.sum(0)) for one in additions]
    shared = [name for name in values[0] if name in values[1] and name not in _OF_TEACHER]
    n = len(sets[0])
    drawn: dict[str, list[np.ndarray]] = defaultdict(list)
    for weights in _draws(n, num_resamples, seed):
        first, second = (one.metrics(weights @ one.columns) for one in additions)
        for name in shared:
            drawn[name].append(second[name] - first[name])
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    for name in shared:
        low, high = np.quantile(np.concatenate(drawn[name]), tails).tolist() if n > 1 else (np.nan, np.nan)
        baseline, value = (float(one[name]) for one in values)
        metric = known.get(name)
        better = None if metric is None else metric.better
        unit = "" if metric is None else metric.unit
        verdict = _verdict(low, high, better)
        yield Difference(task, subset, name, unit, n, baseline, value, value - baseline, low, high, verdict)


def _draws(n: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """[r, n] at a time: how often each example is in each of r draws."""
    generator = np.random.default_rng(seed)
    step = max(1, _AT_A_TIME // n)
    for start in range(0, num_resamples, step):
        count = min(step, num_resamples - start)
        drawn = generator.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(float)


def _verdict(low: float, high: float, better: Literal["lower", "higher"] | None) -> Verdict:
    if not (low > 0 or high < 0):
        return "no difference shown"
    direction: Literal["lower", "higher"] = "higher" if low > 0 else "lower"
    if better is None:
        return direction
    return "better" if direction == better else "worse"
