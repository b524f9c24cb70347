"""The report: what came out, curves, evaluations, models, settings. One page that loads nothing."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import kdtune
from kdtune.reporting import curves, evaluated, findings, quantities, sizes
from kdtune.reporting.charts import Chart, Line, draw, swatch
from kdtune.reporting.markup import Markup, element, escape, page, table
from kdtune.reporting.material import Material
from kdtune.reporting.quantities import Quantity
from kdtune.reporting.runs import MISSING, NUM_LOWEST, Difference, Group, Run, differences, groups, shown
from kdtune.reporting.sizes import Model

_POINTS = 12_000  # of the curves of a chart together
_MOST_SETTINGS = 12  # groups of which every setting is listed
_MOST_COLUMNS = 4  # settings beside each other
_MOST_RAW = 3  # curves behind which each step is shown


def render(material: Material) -> str:
    """The whole document."""
    runs, found = material.runs, groups(material.runs)
    sections: list[tuple[str, str, str]] = []  # id, heading, markup
    if runs:
        sections.append(("runs", "Runs", _runs(found)))
        sections.append(("curves", "Curves", _curves(found)))
    compared = evaluated.compare(material.evaluations, found) if material.evaluations else None
    if compared is not None:
        sections += evaluated.sections(compared)
    if runs:
        sections.append(("models", "Models", _models(runs)))
        sections.append(("settings", "Settings", "".join(_settings(found))))
    title = _title(material)
    notes = [*material.warnings, *(compared.warnings if compared else []), *findings.warnings(found)]
    facts = [
        *(evaluated.sentences(compared) if compared else []),
        *(findings.sentences(found, brief=compared is not None) if found else []),
    ]
    links = Markup(" ".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections))
    body = [
        f"<header><h1>{escape(title)}</h1>\n",
        element("p", f"kdtune {kdtune.__version__} report of {_count(material)}", class_="about"),
        element("nav", links, aria_label="Sections") if len(sections) > 2 else "",
        "</header>\n<main>\n",
        element("ul", *(element("li", line) for line in facts), class_="facts"),
        *(element("p", note, class_="warning") + "\n" for note in notes),
        *(f'<section id="{name}">\n<h2>{escape(heading)}</h2>\n{text}</section>\n' for name, heading, text in sections),
        "</main>\n",
    ]
    return page(f"{title} - kdtune report", "".join(body), style=_file("report.css"), script=_file("report.js"))


def _title(material: Material) -> str:
    names = [run.name for run in material.runs] or [one.name for one in material.evaluations]
    if len(names) <= 3:
        return ", ".join(names)
    folders = list(dict.fromkeys(run.folder.parent.name for run in material.runs))
    return ", ".join(folders) if 0 < len(folders) <= 4 else f"{names[0]} and {len(names) - 1} more"


def _count(material: Material) -> str:
    counts = ((len(material.runs), "run"), (len(material.evaluations), "evaluation"))
    return " and ".join(f"{count:,} {what}{'s' * (count > 1)}" for count, what in counts if count)


# Runs.


def _runs(found: Sequence[Group]) -> str:
    several = any(len(group.runs) > 1 for group in found)
    note = "The last validation of each run. " + "Of several seeds: mean ± standard error. " * several
    note += "Tokens/s are the median over the steps, memory is the highest."
    runs = [run for group in found for run in group.runs]
    if any(run.settings.get("teacher.cache_dir") and "val_kd_loss" in run.series for run in runs):
        note += (
            " The KL to a cached teacher is what its answers tell: of draws an unbiased estimate, which can be below "
            "0; of its likeliest tokens as kd_loss.top_k_convention says."
        )
    text = findings.overview(found) + element("p", note, class_="about")
    if several:
        members = Markup("".join(map(_members, found)))
        text = Markup(text + element("details", element("summary", "Which runs these are"), element("dl", members)))
    return text + "\n"


def _members(group: Group) -> Markup:
    return element("dt", group.name) + element("dd", ", ".join(run.name for run in group.runs))  # type: ignore[return-value]


# Curves.


def _curves(found: Sequence[Group]) -> str:
    runs = [run for group in found for run in group.runs]
    parts = [_legend(found)]
    training = quantities.logged(quantities.TRAINING, runs)
    duplicates = _duplicates(training, runs)
    if duplicates:
        names = " and ".join(one.title.lower() for one in training if one.key in duplicates)
        training = [
            dataclasses.replace(one, unit=f"here the {names} alone") if one.key == "loss" else one for one in training
        ]
    loss_note = _loss_note(runs)
    validation = [_chart(one, found) for one in quantities.logged(quantities.VALIDATION, runs)]
    if validation:
        parts.append("<h3>Validation</h3>\n" + _grid(validation))
    about = _about_smoothing(found)
    parts.append(f'<h3>Training</h3>\n<p class="about">{escape(about + loss_note)}</p>\n')
    parts.append(_grid([_chart(one, found, smooth=True) for one in training if one.key not in duplicates]))
    machine = quantities.logged(quantities.MACHINE, runs)
    parts.append(_grid([_chart(one, found, smooth=one.key != "lr", small=True) for one in machine], small=True))
    others = quantities.logged(quantities.others(runs), runs)
    if others:
        charts = _grid([_chart(one, found, smooth=True, small=True) for one in others], small=True)
        parts.append(
            f"<details><summary>All other numbers that were logged ({len(others)})</summary>{charts}</details>\n"
        )
    return "".join(parts)


def _legend(found: Sequence[Group]) -> str:
    items = (element("li", swatch(group.look), " ", group.name, data_group=i) for i, group in enumerate(found))
    about = ""
    if any(group.look is None for group in found):
        text = f"In colour: the first, and the {NUM_LOWEST} that end lowest. Point at another to bring it out."
        about = element("p", text, class_="about") + "\n"
    return about + f'<ul class="legend{" few" if len(found) <= 6 else ""}">{"".join(items)}</ul>\n'


def _duplicates(training: Sequence[Quantity], runs: Sequence[Run]) -> set[str]:
    """What is the loss itself in all runs, and needs no chart of its own."""
    return {
        one.key
        for one in training
        if one.key != "loss" and all(run.series.get(one.key) == run.series.get("loss") for run in runs)
    }


def _loss_note(runs: Sequence[Run]) -> str:
    names = ("kd_ratio", "kd_loss.", "ce_loss.", "hidden_loss")
    keys = [one.key for one in differences(runs) if one.key.startswith(names)]
    differ = keys if len(keys) <= 3 else list(dict.fromkeys(key.partition(".")[0] for key in keys))
    if not differ:
        return ""
    verb = "differs" if len(differ) == 1 else "differ"
    return f" The loss is each run's own objective: {', '.join(differ)} {verb}, so that heights cannot be compared."


def _about_smoothing(found: Sequence[Group]) -> str:
    widths = sorted({curves.window(len(run.series.get("loss", {}))) for group in found for run in group.runs})
    many = any(len(group.runs) > 1 for group in found)
    said = "Each curve is the mean of a group's runs, the band from their lowest to their highest. " if many else ""
    if widths[-1] == 1:
        return f"{said}Every logged step, nothing smoothed."
    width = f"{widths[0]}" if len(set(widths)) == 1 else f"{widths[0]} to {widths[-1]}"
    thin = "; thin lines are the steps themselves" if len(found) <= _MOST_RAW and not many else ""
    return (
        f"{said}Lines are means over {width} logged steps, half of them before and half after, fewer at the ends{thin}."
    )


def _grid(charts: Sequence[Markup | None], small: bool = False) -> str:
    return f'<div class="charts{" small" if small else ""}">\n' + "\n".join(filter(None, charts)) + "\n</div>\n"


def _chart(quantity: Quantity, found: Sequence[Group], *, smooth: bool = False, small: bool = False) -> Markup | None:
    most = max(100, min(300 if small else 800, _POINTS // len(found)))
    raw = smooth and len(found) <= _MOST_RAW
    lines = [line for i, group in enumerate(found) if (line := _line(i, group, quantity, smooth, raw, most))]
    runs = [run for group in found for run in group.runs]
    level = None
    if quantity.level and (levels := [run.last(quantity.level) for run in runs if quantity.level in run.series]):
        level = ("teacher", levels[0]) if max(levels) - min(levels) < 1e-3 else None
    unit = quantity.unit
    names = {run.settings.get("kd_loss.name") for run in runs if "kd_loss" in run.series}
    if quantity.key == "kd_loss" and names == {"forward_kl"}:
        unit = "forward KL, nats per token"
    from_zero = small and quantity.key in ("tokens_per_second", "peak_memory_gib", "lr")
    return draw(Chart(quantity.title, unit, lines, quantity.share, level, small, from_zero=from_zero))


def _line(i: int, group: Group, quantity: Quantity, smooth: bool, with_raw: bool, most: int) -> Line | None:
    several = [run.series[quantity.key] for run in group.furthest(quantity.key)]
    if not any(not math.isnan(value) for series in several for value in series.values()):
        return None
    band: list[curves.Span] = []
    if len(several) > 1:
        width = curves.window(len(several[0])) if smooth else 1
        points, band = curves.mean_and_band([dict(curves.smoothed(curves.points(one), width)) for one in several])
        if not points:
            return None
        kept = {point.x for point in curves.thinned(points, most)}
        return Line(
            group.name, group.look, i, [p for p in points if p.x in kept], band=[s for s in band if s.x in kept]
        )
    points = curves.points(several[0])
    width = curves.window(len(points)) if smooth else 1
    raw = curves.thinned(points, most) if width > 1 and with_raw else []
    return Line(group.name, group.look, i, curves.thinned(curves.smoothed(points, width), most), raw)


# Models and settings.


def _models(runs: Sequence[Run]) -> str:
    found: dict[tuple[str, Model], list[str]] = {}
    for run in runs:
        for role, model in (("student", run.student), ("teacher", run.teacher)):
            if model is not None:
                alike = Model(**{**model.__dict__, "name": ""}) if role == "student" else model
                found.setdefault((role, alike), []).append(model.name)
    if not found:
        return '<p class="about">The folders of the models are no longer there.</p>\n'
    rows = [_model_row(role, model, names) for (role, model), names in found.items()]
    head = ["", "parameters", "layers", "width", "heads", "vocabulary", "saved as", "size"]
    if any(model.note for _, model in found):
        head.append("")
    else:
        rows = [row[:-1] for row in rows]
    note = "Heads: of queries / of keys and values. Parameters are the numbers in the safetensors files."
    versions = dict.fromkeys(", ".join(f"{name} {v}" for name, v in run.versions.items()) for run in runs)
    made = f" Made with {' and with '.join(versions)}." if any(versions) else ""
    return table(head, rows, class_="notes") + element("p", note + made, class_="about") + "\n"


def _model_row(role: str, model: Model, names: Sequence[str]) -> list[object]:
    name = names[0] if len(set(names)) == 1 else f"{len(names)} alike"
    return [
        Markup(f"{role} {element('small', name)}"),
        "-" if model.parameters is None else sizes.count(model.parameters),
        _or_dash(model.layers),
        _or_dash(model.width),
        model.heads or "-",
        _or_dash(model.vocab_size),
        model.dtype or "-",
        _bytes(model.num_bytes),
        model.note,
    ]


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _settings(found: Sequence[Group]) -> Iterator[str]:
    """Where the groups differ, and all settings of the first run of each."""
    runs = [run for group in found for run in group.runs]
    if len(runs) > 1:
        differ = differences([group.runs[0] for group in found])
        if len(runs) > len(found):
            differ = [one for one in differ if one.key != "seed"]
        of_all = [one for one in differ if MISSING not in one.values]
        of_some = [one for one in differ if MISSING in one.values]
        if of_all:
            yield _differences(of_all, found)
        elif not of_some:
            yield '<p class="about">All runs have the same settings, but for the seed.</p>\n'
        if of_some:
            summary = element("summary", f"Settings that only some of them have ({len(of_some)})")
            yield element("details", summary, _differences(of_some, found)) + "\n"
    for run in [group.runs[0] for group in found][:_MOST_SETTINGS]:
        yield _all_settings(f"All settings of {run.name}" if len(runs) > 1 else "All settings", run)
    if len(found) > _MOST_SETTINGS:
        yield f'<p class="about">The others differ from {escape(found[0].runs[0].name)} as the table says.</p>\n'


def _differences(differ: Sequence[Difference], found: Sequence[Group]) -> Markup:
    """A row for each group, or for each setting if there are more of these."""
    if len(differ) <= max(_MOST_COLUMNS, len(found)):
        rows = [[group.name, *(shown(one.values[i]) for one in differ)] for i, group in enumerate(found)]
        return table(["differ in", *(one.key for one in differ)], rows)
    return table(
        ["differ in", *(group.name for group in found)], [[one.key, *map(shown, one.values)] for one in differ]
    )


def _all_settings(name: str, run: Run) -> str:
    rows = Markup("".join(element("dt", key) + element("dd", shown(value)) for key, value in run.settings.items()))
    return element("details", element("summary", name), element("dl", rows, class_="settings")) + "\n"


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
