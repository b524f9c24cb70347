"""The part of a report that shows evaluations: metrics with their errors, and what differs by more than chance."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kdtune.evaluation import comparing, results
from kdtune.evaluation.comparing import Comparison, Difference
from kdtune.evaluation.estimates import DEFINITIONS
from kdtune.reporting import charts, sizes, texts
from kdtune.reporting.charts import Interval
from kdtune.reporting.markup import Markup, element, escape, table
from kdtune.reporting.material import Evaluated
from kdtune.reporting.runs import MOST_COLOURS, Group

_MOST_SENTENCES = 6
_MINUS = "\u2212"  # as wide as a plus

Key = tuple[str, str | None, str]  # task, subset, metric


@dataclass(frozen=True)
class Evaluations:
    """Those of a report, in the order given; the first is what the others are compared with."""

    members: Sequence[Evaluated]
    looks: Sequence[int | None]  # the colour of each: that of the run that made its model
    comparisons: Sequence[Comparison | None]  # of each but the first; None where they cannot be compared
    warnings: Sequence[str]

    @property
    def first(self) -> Evaluated:
        return self.members[0]


def compare(members: Sequence[Evaluated], groups: Sequence[Group]) -> Evaluations:
    """Compare all with the first.

    Args:
        members: of the report; at least one.
        groups: runs of the report, whose colours the evaluations of their models take.
    """
    comparisons: list[Comparison | None] = []
    warnings = []
    caveats: dict[str, list[str]] = {}  # -> of which evaluations
    for one in members[1:]:
        try:
            comparison = comparing.compare(members[0].folder, one.folder)
        except ValueError as error:
            comparison = None
            warnings.append(f"{one.name} cannot be compared with {members[0].name}: {error}")
        comparisons.append(comparison)
        for line in comparison.caveats if comparison else ():
            caveats.setdefault(line, []).append(one.name)
    warnings += [f"{', '.join(names)} against {members[0].name}: {line}" for line, names in caveats.items()]
    return Evaluations(members, _looks(members, groups), comparisons, warnings)


def _looks(members: Sequence[Evaluated], groups: Sequence[Group]) -> list[int | None]:
    if len(members) > MOST_COLOURS:
        return [None] * len(members)
    found: list[int | None] = []
    unused = itertools.count(1 + max((group.look for group in groups if group.look is not None), default=-1))
    for one in members:
        name = one.evaluation.model.name.partition(" + ")[0].removesuffix("/").removesuffix("/model").lstrip("/")
        of_model = (group for group in groups for run in group.runs if run.folder.as_posix().endswith(f"/{name}"))
        look = next((group.look for group in of_model), None)
        found.append(next(unused) if look is None or look in found else look)
    return found


def sections(found: Evaluations) -> list[tuple[str, str, str]]:
    """Id, heading and markup of each."""
    shown = [("evaluation", "Evaluation", _metrics(found) + _differences(found) + _models(found))]
    if any(one.evaluation.samples for one in found.members):
        shown.append(("continuations", "Continuations", texts.continuations(found.members)))
    if any(one.responses for one in found.members):
        shown.append(("responses", "Responses", texts.responses(found.members)))
    if any(one.tokens for one in found.members):
        shown.append(("tokens", "Token by token", texts.tokens(found.members)))
    return shown


# In words.


def sentences(found: Evaluations) -> Iterator[Markup]:
    """The main facts: of one evaluation its numbers, of several which is best and whether that may be chance."""
    keys = [key for key in _keys(found) if _is_main(found, key)][:_MOST_SENTENCES]
    if len(found.members) == 1:
        for task in dict.fromkeys(task for task, _, _ in keys):
            result = next(one for one in found.first.evaluation.results if (one.task, one.subset) == (task, None))
            names = [name for of_task, _, name in keys if of_task == task]
            numbers = ", ".join(f"{_phrase(name)} <b>{_value(result.metrics[name])}</b>" for name in names)
            yield Markup(f"On {result.num_examples:,} examples of {_task(task)}: {numbers}.")
        return
    said = [line for key in keys if (line := _best(found, key))]
    yield from said
    if said and any(found.comparisons):
        yield element(
            "small",
            "In brackets: 95% intervals over the examples, by paired bootstrap. What another seed of training would "
            "change is not in them.",
        )


def _best(found: Evaluations, key: Key) -> Markup | None:
    """Which evaluation is best at a metric, held against the first."""
    metrics = _rivals(found, key)
    values = {i: metric.value for i, metric in metrics.items()}
    if len(values) < 2 or (better := next(iter(metrics.values())).better) is None:
        return None
    if min(values.values()) == max(values.values()):
        return Markup(f"On {_task(key[0])}, {_phrase(key[2])} is the same in all: {_value(metrics[min(values)])}.")
    best = (min if better == "lower" else max)(values, key=lambda i: values[i])
    text = (
        f"On {_task(key[0])}, the {'lowest' if better == 'lower' else 'highest'} {_phrase(key[2])} is that of "
        f"<b>{escape(found.members[best].name)}</b>, {_value(metrics[best])}"
    )
    if best == 0:
        others = [one for i in values if i and (one := _difference(found, i, key)) is not None]
        if not others:
            return Markup(f"{text}.")
        nearest = min(others, key=lambda one: abs(one.difference))
        chance = "" if nearest.verdict == "worse" else ", which may be chance"
        return Markup(f"{text}; the next is {_apart(nearest)} away{chance}.")
    difference = _difference(found, best, key)
    if difference is None:
        return Markup(f"{text}.")
    side = "below" if difference.difference < 0 else "above"
    chance = "" if difference.verdict == "better" else ", which may be chance"
    return Markup(f"{text}, {_apart(difference)} {side} {escape(found.first.name)}{chance}.")


def _apart(one: Difference) -> str:
    """How far two are apart, and the interval of that."""
    sign = -1 if one.difference < 0 else 1
    scale, unit = (100, " points") if one.unit == "share" else (1, "")
    low, high = sorted((sign * one.low, sign * one.high))
    digits = _decimals(scale * (one.high - one.low) / 4)
    return f"{scale * abs(one.difference):.{digits}f}{unit} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _is_main(found: Evaluations, key: Key) -> bool:
    task, subset, name = key
    first = next(r for one in found.members for r in one.evaluation.results if r.task == task)
    return subset is None and name in results.main_metrics(first)


# The metrics.


def _metrics(found: Evaluations) -> str:
    """Tables: one for each of our own tasks, one for all others together; those of subsets are folded."""
    keys = _keys(found)
    own = [task for task in dict.fromkeys(task for task, _, _ in keys) if task in ("text", "responses")]
    parts: list[str] = [_metric_table(found, [key for key in keys if key[:2] == (task, None)], task) for task in own]
    if others := [key for key in keys if key[0] not in own and key[1] is None]:
        parts.append(_metric_table(found, others, None))
    if subsets := [key for key in keys if key[1] is not None]:
        parts.append(element("details", element("summary", "By subset"), _metric_table(found, subsets, None)) + "\n")
    return "".join(parts)


def _metric_table(found: Evaluations, keys: Sequence[Key], task: str | None) -> Markup:
    names = [_name(one, look) for one, look in zip(found.members, found.looks, strict=True)]
    head = ["task" if task is None else _headline(found, task), *names, ""]
    return table(head, [list(_metric_row(found, key, with_task=task is None)) for key in keys])


def _name(one: Evaluated, look: int | None) -> Markup:
    return Markup(f"{charts.swatch(look)} {escape(one.name)}")


def _headline(found: Evaluations, task: str) -> str:
    counts = dict.fromkeys(
        f"{result.num_examples:,} examples, {result.num_tokens:,} tokens"
        for one in found.members
        for result in one.evaluation.results
        if (result.task, result.subset) == (task, None)
    )
    return f"{_task(task)}: {' or '.join(counts)}"


def _metric_row(found: Evaluations, key: Key, *, with_task: bool) -> Iterator[object]:
    name = key[2]
    meaning = f" {DEFINITIONS[name].meaning}" if name in DEFINITIONS else ""
    yield _label(key) if with_task else Markup(escape(name) + element("small", meaning, class_="meaning"))
    metrics = [_metric(one, key) for one in found.members]
    unit, better = next((metric.unit, metric.better) for metric in metrics if metric is not None)
    rivals = _rivals(found, key)
    values = [metric.value for metric in rivals.values()]
    best = None
    if better and values and min(values) < max(values):
        best = min(values) if better == "lower" else max(values)
    for i, metric in enumerate(metrics):
        if metric is None:
            yield "-"
            continue
        value, stderr = _rounded(metric)
        text = Markup(f"{value}{element('small', f' ± {stderr}') if stderr else ''}")
        yield element("b", text) if i in rivals and metric.value == best else text
    arrow = {"lower": "↓", "higher": "↑", None: ""}[better]
    yield element("small", " ".join(filter(None, ("%" if unit == "share" else unit, arrow))))


def _label(key: Key) -> Markup:
    task, subset, name = key
    return Markup(f"{escape(task if subset is None else f'{task}: {subset}')} {element('small', name)}")


def _rounded(metric: results.Metric) -> tuple[str, str]:
    scale = 100 if metric.unit == "share" else 1
    return results.rounded(scale * metric.value, None if metric.stderr is None else scale * metric.stderr)


def _value(metric: results.Metric) -> str:
    value, stderr = _rounded(metric)
    unit = "%" if metric.unit == "share" else f" {escape(metric.unit)}" if metric.unit else ""
    return f"{value}{f' ± {stderr}' if stderr else ''}{unit}"


# What differs.


def _differences(found: Evaluations) -> str:
    """A row for each metric: the differences from the first, drawn with the better side on the right."""
    if not any(found.comparisons):
        return ""
    rows = [row for key in _keys(found) if (row := _difference_row(found, key))]
    others = zip(found.members[1:], found.looks[1:], found.comparisons, strict=True)
    names = [_name(one, look) for one, look, comparison in others if comparison is not None]
    sides = Markup('<span class="sides"><span>worse</span><span>0</span><span>better</span></span>')
    about = (
        "95% intervals by paired bootstrap over the examples, each row to its own scale; bold where they leave out 0. "
        "Of 20 rows without any difference one would be bold by chance. Grey: neither side is the good one, and higher "
        "is on the right. pp: percentage points."
    )
    left_out = dict.fromkeys(line for comparison in found.comparisons if comparison for line in comparison.left_out)
    return (
        f"<h3>Differences from {escape(found.first.name)}</h3>\n"
        + table(["", sides, *names], rows)
        + element("p", about, class_="about")
        + "".join(element("p", f"Left out: {line}", class_="about") for line in left_out)
        + "\n"
    )


def _difference_row(found: Evaluations, key: Key) -> list[object]:
    """Empty where nothing can differ, as of the teacher's own numbers."""
    known = [
        (_difference(found, i, key), look)
        for i, (look, comparison) in enumerate(zip(found.looks[1:], found.comparisons, strict=True), start=1)
        if comparison is not None
    ]
    drawn = [(one, look) for one, look in known if one is not None and one.low < one.high]
    if not drawn:
        return []
    better = next(metric for one in found.members if (metric := _metric(one, key))).better
    sign = -1 if better == "lower" else 1
    bars = [
        Interval(
            low=min(sign * one.low, sign * one.high),
            high=max(sign * one.low, sign * one.high),
            middle=sign * one.difference,
            look=look if better else None,
        )
        for one, look in drawn
    ]
    name = _label(key) if key[0] != "text" or key[1] is not None else escape(key[2])
    return [name, charts.intervals(bars), *(_difference_cell(one) for one, _ in known)]


def _difference_cell(one: Difference | None) -> object:
    if one is None or math.isnan(one.difference):
        return "-"
    scale, unit = (100, " pp") if one.unit == "share" else (1, "")
    digits = _decimals(scale * (one.high - one.low) / 4)
    middle, low, high = (
        f"{scale * value:+.{digits}f}".replace("-", _MINUS) for value in (one.difference, one.low, one.high)
    )
    text = Markup(f"{middle}{unit} {element('small', f'[{low}, {high}]')}")
    return element("b", text) if one.verdict != "no difference shown" else text


def _decimals(error: float) -> int:
    """As many as an error of this size leaves any meaning."""
    return max(0, 1 - math.floor(math.log10(error))) if error > 0 else 2


# Looking things up.


def _keys(found: Evaluations) -> list[Key]:
    """Each once."""
    of_all = (
        (result.task, result.subset, name)
        for one in found.members
        for result in one.evaluation.results
        for name in result.metrics
    )
    return list(dict.fromkeys(of_all))


def _metric(one: Evaluated, key: Key) -> results.Metric | None:
    task, subset, name = key
    of_key = (result.metrics for result in one.evaluation.results if (result.task, result.subset) == (task, subset))
    return next(of_key, {}).get(name)


def _rivals(found: Evaluations, key: Key) -> dict[int, results.Metric]:
    """What can be ranked: the first and those that were compared with it, by their place, as far as they are finite."""
    if _metric(found.first, key) is None:
        return {}
    compared = [0, *(i for i, comparison in enumerate(found.comparisons, start=1) if comparison)]
    metrics = ((i, _metric(found.members[i], key)) for i in compared)
    return {i: metric for i, metric in metrics if metric and not math.isnan(metric.value)}


def _difference(found: Evaluations, index: int, key: Key) -> Difference | None:
    comparison = found.comparisons[index - 1]
    differences = comparison.differences if comparison else ()
    return next((one for one in differences if (one.task, one.subset, one.metric) == key), None)


_PHRASES: Mapping[str, str] = {
    "ce": "cross-entropy",
    "kl_from_teacher": "KL to the teacher",
    "top1_agreement": "top-1 agreement with the teacher",
    "rouge_l": "Rouge-L",
}


def _phrase(name: str) -> Markup:
    return escape(_PHRASES.get(name, name))


def _task(task: str) -> Markup:
    return escape({"text": "held-out text"}.get(task, task))


def _models(found: Evaluations) -> str:
    rows = [
        [
            Markup(f"{escape(one.name)} {element('small', role)}"),
            model.name,
            sizes.count(model.parameters),
            model.num_layers,
            model.hidden_size,
            f"{model.vocab_size:,}",
            model.dtype if model.quantization is None else f"{model.dtype}, {model.quantization}",
        ]
        for one in found.members
        for role, model in (("", one.evaluation.model), ("its teacher", one.evaluation.teacher))
        if model is not None
    ]
    head = ["", "folder", "parameters", "layers", "width", "vocabulary", "computed in"]
    return element("details", element("summary", "The models that were evaluated"), table(head, rows)) + "\n"
