"""What came out, in words and in a table, with as much certainty as the seeds give."""

import math
from collections.abc import Iterator, Sequence
from statistics import median

from kdtune.reporting import seeds
from kdtune.reporting.charts import number, swatch
from kdtune.reporting.markup import Markup, element, escape, table
from kdtune.reporting.quantities import VALIDATION, Quantity, logged
from kdtune.reporting.runs import Group, Run, differences

_BEST = {"lower": min, "higher": max}


def sentences(groups: Sequence[Group], brief: bool = False) -> list[Markup]:
    """The main facts, the most important first.

    Args:
        groups: of runs.
        brief: of the validation the cross-entropy alone, since evaluations tell more.
    """
    runs = [run for group in groups for run in group.runs]
    measured = [one for one in logged(VALIDATION, runs) if one.better][: 1 if brief else None]
    if not measured:
        return [
            Markup("No run was validated: only losses on the rows they were trained on are known. Set dataset_val.")
        ]
    said = []
    if len(groups) == 1:
        said += [_course(groups[0], quantity) for quantity in measured]
    elif same_validation(runs):
        said += [line for quantity in _comparable(measured, runs) if (line := _best(groups, quantity))]
        if any(
            seeds.difference(_by_seed(group, VALIDATION[0]), _by_seed(groups[0], VALIDATION[0])) for group in groups[1:]
        ):
            said.append(
                element(
                    "small",
                    "In brackets: 95% intervals of the difference between runs with the same seed, by Student's t.",
                )
            )
        if all(len(group.runs) == 1 for group in groups):
            said.append(
                Markup("Each of these is a single run. How much of a difference is chance, other seeds would tell.")
            )
    said += _peaks(groups)
    return said


def same_validation(runs: Sequence[Run]) -> bool:
    """Whether the validation numbers of all runs are of the same tokens."""
    return not validation_settings(runs)


def _teachers(runs: Sequence[Run]) -> list[float]:
    """The validation cross-entropy of the teachers, by which they are told apart; lowest and highest."""
    levels = [level for run in runs if not math.isnan(level := run.last("val_teacher_ce_loss"))]
    return [min(levels), max(levels)] if levels and max(levels) - min(levels) > 1e-3 else []


def _ways(runs: Sequence[Run]) -> list[str]:
    """The settings by which the KL to the teacher is another quantity: whole, an estimate from draws, of its top k."""
    ways = ("teacher.cache_dir", "kd_loss.top_k_convention")
    return [one.key for one in differences([run for run in runs if "val_kd_loss" in run.series]) if one.key in ways]


def _comparable(measured: Sequence[Quantity], runs: Sequence[Run]) -> list[Quantity]:
    """Distances to different teachers are not, nor those that were measured in different ways."""
    forbidden = {"val_kd_loss", "val_agreement"} if _teachers(runs) else {"val_kd_loss"} if _ways(runs) else set()
    return [one for one in measured if one.key not in forbidden]


def validation_settings(runs: Sequence[Run]) -> list[str]:
    """The settings by which runs were validated on different rows."""
    validated = [run for run in runs if "val_ce_loss" in run.series]
    about_rows = ("dataset_val", "tokenizer.")
    return [one.key for one in differences(validated) if one.key.startswith(about_rows)]


def warnings(groups: Sequence[Group]) -> Iterator[str]:
    """What forbids a comparison, or makes one doubtful."""
    runs = [run for group in groups for run in group.runs]
    if keys := validation_settings(runs):
        yield (
            f"The runs were validated on different rows ({', '.join(keys)} differ), so that their validation numbers "
            "cannot be compared. kdtune run evaluate measures all on the same."
        )
    elif teachers := _teachers(runs):
        yield (
            f"The teachers differ: their own validation cross-entropy is from {number(teachers[0])} to "
            f"{number(teachers[1])}. Distances to them, and agreement with them, cannot be compared."
        )
    elif ways := _ways(runs):
        verb = "differs" if len(ways) == 1 else "differ"
        yield (
            f"The KL to the teacher was measured in different ways ({' and '.join(ways)} {verb}) and "
            "cannot be compared. kdtune run evaluate measures all beside the teacher itself."
        )
    gaps = []
    for run in runs:
        counts = {key: sum(map(math.isnan, series.values())) for key, series in run.series.items()}
        listed = [f"{key} at {count:,} step{'s' * (count > 1)}" for key, count in counts.items() if count]
        gaps += [f"{run.name} ({', '.join(listed)})"] if listed else []
    if gaps:
        yield f"Not finite, so that the curves have gaps: {', '.join(gaps)}"
    unfinished = [run for run in runs if not run.is_finished]
    if unfinished:
        ends = ", ".join(f"{run.name} (step {run.last_step:,})" for run in unfinished)
        yield f"Not finished, so that there is no model yet: {ends}"
    behind = dict.fromkeys(
        run.name
        for group in groups
        for key in ("val_ce_loss", "loss")
        for run in group.runs
        if key in run.series and max(run.series[key]) < group.end(key)
    )
    if behind:
        yield f"Not as far as others of their group, and left out of its means and curves: {', '.join(behind)}"


def _course(group: Group, quantity: Quantity) -> Markup:
    """How a single run, or the mean of some, went from the first validation to the last."""
    runs = group.furthest(quantity.key)
    first, last = ([list(run.series[quantity.key].values())[i] for run in runs] for i in (0, -1))
    steps = max(max(run.series[quantity.key]) for run in runs)
    if all(len(run.series[quantity.key]) == 1 for run in runs):
        return Markup(f"{_capital(quantity)}: {_estimate(last, quantity)} after {steps:,} steps.")
    text = (
        f"{_capital(quantity)} went from {_estimate(first, quantity)} to <b>{_estimate(last, quantity)}</b>"
        f"{'' if quantity.share else f' {quantity.unit}'} over {steps:,} steps."
    )
    if quantity.level and (levels := [run.last(quantity.level) for run in runs if quantity.level in run.series]):
        start, end, level = (sum(values) / len(values) for values in (first, last, levels))
        text += f" The teacher's own is {number(level)}"
        if start > level and end < start:
            text += f": {(start - end) / (start - level):.0%} of the distance to it is gone"
        text += "."
    return Markup(text)


def _best(groups: Sequence[Group], quantity: Quantity) -> Markup | None:
    """Which ends best, and how far before the next and before the first."""
    ends = {i: mean for i, group in enumerate(groups) if not math.isnan(mean := group.mean(quantity.key))}
    if len(ends) < 2 or quantity.better is None:
        return None
    ranked = sorted(ends, key=lambda i: ends[i], reverse=quantity.better == "higher")
    best, second = ranked[:2]
    text = (
        f"{'Lowest' if quantity.better == 'lower' else 'Highest'} {escape(quantity.phrase)}"
        f": <b>{escape(groups[best].name)}</b>, {_estimate(groups[best].finals(quantity.key), quantity)}"
        f"{'' if quantity.share else f' {quantity.unit}'}"
    )
    rivals = list(dict.fromkeys((second, min(ends))) if best != min(ends) else [second])
    compared = [_distance(groups[best], groups[rival], quantity, is_next=rival == second) for rival in rivals]
    return Markup(f"{text}: {', and '.join(compared)}.")


def _distance(best: Group, rival: Group, quantity: Quantity, *, is_next: bool) -> str:
    sign, word = (-1, "below") if quantity.better == "lower" else (1, "above")
    found = seeds.difference(_by_seed(best, quantity), _by_seed(rival, quantity))
    away = sign * (best.mean(quantity.key) - rival.mean(quantity.key) if found is None else found.mean)
    bracket = ""
    if found is not None and found.interval is not None:
        low, high = sorted(sign * edge for edge in found.interval)
        bracket = f" [{_plain(low, quantity)}, {_plain(high, quantity)}]"
        if low < 0 < high:
            bracket += f", not to be told from chance with {found.num_values} seeds,"
    steps = best.end(quantity.key), rival.end(quantity.key)
    notes = ["next"] * is_next + [f"{steps[1]:,} steps against {steps[0]:,}"] * (steps[0] != steps[1])
    text = f"{_plain(away, quantity)}{' points' * quantity.share}{bracket} {word} {escape(rival.name)}"
    if not away and not bracket:
        text = f"the same as {escape(rival.name)}"
    return text + (f" ({', '.join(notes)})" if notes else "")


def _by_seed(group: Group, quantity: Quantity) -> dict[int, float]:
    ends = {run.seed: run.last(quantity.key) for run in group.furthest(quantity.key)}
    return {seed: value for seed, value in ends.items() if seed is not None and not math.isnan(value)}


def _peaks(groups: Sequence[Group]) -> Iterator[Markup]:
    """Runs whose validation was better before their end."""
    quantity = VALIDATION[0]
    for run in (run for group in groups for run in group.runs):
        finite = {step: value for step, value in run.series.get(quantity.key, {}).items() if not math.isnan(value)}
        if len(finite) < 3:
            continue
        step = min(finite, key=lambda step: finite[step])
        last = list(finite.values())[-1]
        if last > finite[step] * 1.005:
            yield Markup(
                f"<b>{escape(run.name)}</b> was best at step {step:,} ({number(finite[step])}) and then rose to "
                f"{number(last)}: it began to learn its rows by heart, or its learning rate was too high."
            )


def _plain(value: float, quantity: Quantity) -> str:
    if quantity.share:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1g}"


def _capital(quantity: Quantity) -> Markup:
    return escape(quantity.phrase[0].upper() + quantity.phrase[1:])


def _estimate(values: Sequence[float], quantity: Quantity) -> str:
    found = seeds.estimate(values)
    if math.isnan(found.mean):
        return "nan"
    if found.stderr is None:
        return number(found.mean, quantity.share)
    scale, decimals, unit = (100, 1, "%") if quantity.share else (1, 3, "")
    if 0 < scale * found.stderr < 0.5 * 10**-decimals:
        decimals += 1
    return f"{scale * found.mean:.{decimals}f} ± {scale * found.stderr:.{decimals}f}{unit}"


def overview(groups: Sequence[Group]) -> Markup:
    """A row for each group: what it is, how far it came, and its last numbers; the best of each column is bold."""
    runs = [run for group in groups for run in group.runs]
    measured = [one for one in logged(VALIDATION, runs) if one.better]
    if not measured:
        measured = [Quantity("loss", "last loss", "", None)]
    head = ["run", *(["seeds"] if len(runs) > len(groups) else []), "steps", *(_column(one) for one in measured)]
    head += ["tokens/s", "peak GiB"]
    bests = {}
    if len(groups) > 1 and same_validation(runs):
        for one in _comparable(measured, runs):
            ends = [mean for group in groups if not math.isnan(mean := group.mean(one.key))]
            if one.better and ends:
                bests[one.key] = _BEST[one.better](ends)
    rows = []
    for group in groups:
        row: list[object] = [Markup(f"{swatch(group.look)} {escape(group.name)}")]
        row += [len(group.runs)] if len(runs) > len(groups) else []
        row.append(_range([run.last_step for run in group.runs]))
        for one in measured:
            values = group.finals(one.key)
            text = _estimate(values, one) if values else "-"
            row.append(element("b", text) if group.mean(one.key) == bests.get(one.key) else text)
        row.append(_typical(group, "tokens_per_second", "{:,.0f}"))
        row.append(_typical(group, "peak_memory_gib", "{:.2f}"))
        rows.append(row)
    if (teacher := _teacher_row(runs, measured, len(head))) is not None:
        rows.append(teacher)
    return table(head, rows)


def _column(quantity: Quantity) -> Markup:
    return escape(quantity.column or quantity.title)


def _teacher_row(runs: Sequence[Run], measured: Sequence[Quantity], num_columns: int) -> list[object] | None:
    """The teacher's own validation, if it is the same in all runs."""
    levels = [level for run in runs if not math.isnan(level := run.last("val_teacher_ce_loss"))]
    if not levels or _teachers(runs):
        return None
    own = {"val_ce_loss": number(levels[0]), "val_kd_loss": "0", "val_agreement": "100%"}
    cells = [own.get(one.key, "") for one in measured]
    before = num_columns - len(cells) - 3
    return ["teacher", *[""] * before, *cells, "", ""]


def _typical(group: Group, key: str, form: str) -> str:
    values = [v for run in group.runs for v in run.series.get(key, {}).values() if not math.isnan(v)]
    if not values:
        return "-"
    return form.format(max(values) if key == "peak_memory_gib" else median(values))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} - {high:,}"
