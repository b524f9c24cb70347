"""Line charts as inline SVG that is complete without a script, in words for those who do not see it."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kdtune.reporting.curves import Point, Span
from kdtune.reporting.markup import Markup, element

COLOURS, DASHES, MARKS = 7, 3, 4  # how many there are of each in report.css and below
_FEW = 25  # a curve of so many points marks each


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    name: str
    look: int | None  # which colour, dash and mark; None: one of many, in grey
    group: int  # that it shows, by which a legend finds it
    points: Sequence[Point]  # in the order of x
    raw: Sequence[Point] = ()  # drawn thin behind it
    band: Sequence[Span] = ()  # drawn pale behind it


@dataclass(frozen=True)
class Chart:
    """One quantity over the steps.

    Args:
        title: what it is.
        unit: of the values.
        lines: curves; at least one with a finite value.
        share: values are shares of 1, and shown in percent.
        level: a value to hold against, and its name.
        small: one of many small ones.
        note: what else is to be known.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    share: bool = False
    level: tuple[str, float] | None = None
    small: bool = False
    note: str = ""
    from_zero: bool = field(default=False)


@dataclass(frozen=True)
class _Scale:
    """Values to pixels along an axis, [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def draw(chart: Chart) -> Markup:
    """The chart as a figure with its caption."""
    width, height = (280, 150) if chart.small else (440, 240)
    values = [value for line in chart.lines for value in _values(line)] + ([chart.level[1]] if chart.level else [])
    low, high = min(values), max(values)
    log = low > 0 and high / low > 100 and not chart.share and not chart.from_zero
    if chart.from_zero:
        low = min(0.0, low)
    low, high = _padded(low, high, log)
    y_ticks = log_ticks(low, high) if log else ticks(low, high, 3 if chart.small else 5)
    labels = [f"{tick:g}" for tick in y_ticks] if log else tick_labels(y_ticks, chart.share)
    ends = _ends(chart) if len(chart.lines) <= (1 if chart.small else 6) else []
    left = 10 + 6.2 * max(map(len, labels))
    right = width - (8 + 6.9 * max((len(text) for _, text, _ in ends), default=0))
    top, bottom = 8, height - 22
    steps = [point.x for line in chart.lines for point in itertools.chain(line.points, line.raw)]
    x = _Scale(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, left, right)
    y = _Scale(low, high, bottom, top, log)

    parts: list[Markup] = [
        *(_grid(y(tick), label, left, right) for tick, label in zip(y_ticks, labels, strict=True)),
        *_x_axis(x, 3 if chart.small else 5, bottom),
    ]
    if chart.level:
        name, value = chart.level
        parts.append(_path([(left, y(value)), (right, y(value))], "level"))
        parts.append(element("text", name, class_="level", x=_px(left + 4), y=_px(y(value) - 4)))
    parts += [_behind(line, x, y) for line in chart.lines if line.raw or line.band]
    parts += [_curve(line, x, y) for line in sorted(chart.lines, key=lambda line: line.look is not None)]
    parts += _end_labels(ends, x, y, top, bottom)
    inner = Markup("\n".join(parts))
    domain = " ".join(f"{v:.8g}" for v in (x.low, x.high, x.start, x.end, y.low, y.high, y.start, y.end, int(log)))
    svg = element(
        "svg",
        element("desc", describe(chart)),
        inner,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=chart.title,
        data_scale=domain,
        data_share=int(chart.share),
    )
    unit = ", ".join(part for part in (chart.unit, "log scale" if log else "", chart.note) if part)
    caption = element("figcaption", element("b", chart.title), " ", element("small", unit))
    return element("figure", caption, svg, class_="chart small" if chart.small else "chart")


@dataclass(frozen=True)
class Interval:
    """What is likely for a difference."""

    low: float
    high: float
    middle: float
    look: int | None  # None: neither side is the good one


def intervals(several: Sequence[Interval]) -> Markup:
    """Bars with a dot, one below the other, on both sides of zero; all to the same scale."""
    width, row = 180, 11
    reach = max(max(abs(one.low), abs(one.high)) for one in several) or 1.0
    x = _Scale(-reach, reach, 6, width - 6)
    height = row * len(several) + 5
    parts = [_path([(x(0), 0), (x(0), height)], "zero")]
    for i, one in enumerate(several):
        y = row * (i + 0.5) + 2.5
        bar = _path([(x(one.low), y), (x(one.high), y)], "bar")
        dot = element("circle", cx=_px(x(one.middle)), cy=_px(y), r=3)
        parts.append(element("g", bar, dot, class_=_classes(one.look)))
    return element("svg", *parts, class_="intervals", viewBox=f"0 0 {width} {height}", aria_hidden="true")


def describe(chart: Chart) -> str:
    """What a chart shows, in words."""
    said = []
    for line in chart.lines:
        finite = [point for point in line.points if not math.isnan(point.y)]
        if not finite:
            said.append(f"{line.name}: no finite value.")
            continue
        lowest, highest = min(finite, key=lambda p: p.y), max(finite, key=lambda p: p.y)
        numbers = [number(point.y, chart.share) for point in (finite[0], finite[-1], lowest, highest)]
        said.append(
            f"{line.name}: from {numbers[0]} at step {finite[0].x:,.0f} to {numbers[1]} at step {finite[-1].x:,.0f}, "
            f"lowest {numbers[2]} at step {lowest.x:,.0f}, highest {numbers[3]} at step {highest.x:,.0f}."
        )
    if chart.level:
        said.append(f"{chart.level[0]}: {number(chart.level[1], chart.share)}.")
    return " ".join([f"{chart.title}, {chart.unit}, over the steps." if chart.unit else chart.title, *said])


def swatch(look: int | None) -> Markup:
    """A piece of a line in the look of a run, for a legend."""
    parts = [element("path", class_="line", d="M1 6H27"), *([] if look is None else [_mark(look, 14, 6)])]
    return element("svg", *parts, class_=_classes(look, "swatch"), viewBox="0 0 28 12", aria_hidden="true")


def number(value: float, share: bool = False) -> str:
    """Three decimals, of small numbers three digits; of a share percent with one decimal."""
    if math.isnan(value):
        return "-"
    if share:
        return f"{value:.1%}"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{_num_decimals(size)}f}" if size else "0"


def _num_decimals(size: float) -> int:
    digits = math.floor(math.log10(size))
    return max(1, 3 - digits) if digits > 0 else 3 if digits > -2 else 2 - digits


# Axes.


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in a range: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in a range, of many every second or third."""
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [10.0**e for e in exponents[:: max(1, -(-len(exponents) // 5))]]


def tick_labels(values: Sequence[float], share: bool = False) -> list[str]:
    """As many decimals as the distance of the ticks takes; k, M and G for thousands, millions and more."""
    labels = _short_labels(values, share)
    return labels if len(set(labels)) == len(labels) else [f"{value:.12g}" for value in values]


def _short_labels(values: Sequence[float], share: bool) -> list[str]:
    if share:
        decimals = max((_decimals(100 * value) for value in values), default=0)
        return [f"{100 * value:.{decimals}f}%" for value in values]
    largest = max(map(abs, values), default=0.0)
    if largest and largest < 1e-3:
        return [f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0" for value in values]
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size or (size > 1e3 and largest >= size):
            scaled = [value / size for value in values]
            decimals = max(map(_decimals, scaled))
            return [f"{value:.{decimals}f}{suffix}" if value else "0" for value in scaled]
    decimals = max(map(_decimals, values), default=0)
    return [f"{value:,.{decimals}f}" for value in values]


def _decimals(value: float) -> int:
    text = f"{value:.6f}".rstrip("0")
    return len(text) - text.index(".") - 1


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        factor = (high / low) ** 0.04
        return low / factor, high * factor
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return (low if low == 0 else low - room), high + room


def _grid(y: float, label: str, left: float, right: float) -> Markup:
    text = element("text", label, x=_px(left - 6), y=_px(y + 3.5), class_="y")
    return Markup(_path([(left, y), (right, y)], "grid") + text)


def _x_axis(x: _Scale, about: int, bottom: float) -> Iterable[Markup]:
    found = [tick for tick in ticks(x.low, x.high, about) if tick == round(tick)]
    for tick, label in zip(found, tick_labels(found), strict=True):
        yield element("text", label, x=_px(x(tick)), y=_px(bottom + 15), class_="x")


# Curves.


def _values(line: Line) -> Iterable[float]:
    yield from (point.y for point in itertools.chain(line.points, line.raw) if not math.isnan(point.y))
    for span in line.band:
        yield from (span.low, span.high)


def _behind(line: Line, x: _Scale, y: _Scale) -> Markup:
    """What no line of any run is to be hidden by."""
    edge = [(x(s.x), y(s.high)) for s in line.band] + [(x(s.x), y(s.low)) for s in reversed(line.band)]
    band = [_path(edge, "band", closed=True)] if edge else []
    raw = [_lines(line.raw, x, y, "raw")] if line.raw else []
    return element("g", *band, *raw, class_=_classes(line.look), data_group=line.group)


def _curve(line: Line, x: _Scale, y: _Scale) -> Markup:
    finite = [point for point in line.points if not math.isnan(point.y)]
    data = {"data_x": " ".join(f"{point.x:g}" for point in finite), "data_y": " ".join(f"{p.y:.5g}" for p in finite)}
    marks = [_mark(line.look, x(p.x), y(p.y)) for p in finite] if line.look is not None and len(finite) <= _FEW else []
    curve = _lines(line.points, x, y, "line", data_name=line.name, **data)
    return element("g", curve, *marks, class_=_classes(line.look), data_group=line.group)


def _lines(points: Sequence[Point], x: _Scale, y: _Scale, name: str, **attributes: object) -> Markup:
    """Interrupted at each gap; a point between two gaps is a dot."""
    stretches = [
        [(x(point.x), y(point.y)) for point in stretch]
        for is_gap, stretch in itertools.groupby(points, key=lambda point: math.isnan(point.y))
        if not is_gap
    ]
    return element("path", class_=name, d=" ".join(map(_d, stretches)), **attributes)


def _d(pixels: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_px(px)} {_px(py)}" for px, py in (pixels if len(pixels) > 1 else [*pixels, *pixels]))


def _path(pixels: Sequence[tuple[float, float]], name: str, closed: bool = False) -> Markup:
    return element("path", class_=name, d=_d(pixels) + "Z" * closed)


def _mark(look: int, x: float, y: float) -> Markup:
    """A disc, a square, a diamond or a triangle."""
    r = 2.6
    shapes = (
        f"M{_px(x - r)} {_px(y)}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0",
        f"M{_px(x - r)} {_px(y - r)}h{2 * r}v{2 * r}h{-2 * r}Z",
        f"M{_px(x)} {_px(y - 3.6)}l3.6 3.6l-3.6 3.6l-3.6 -3.6Z",
        f"M{_px(x)} {_px(y - 3.4)}l3.4 6.2h-6.8Z",
    )
    return element("path", class_="mark", d=shapes[look % MARKS])


def _classes(look: int | None, *others: str) -> str:
    if look is None:
        return " ".join([*others, "grey"])
    dash = look // COLOURS % DASHES
    return " ".join([*others, f"c{look % COLOURS}", *([f"d{dash}"] if dash else [])])


# Numbers at the ends of the lines.


def _ends(chart: Chart) -> list[tuple[Point, str, Line]]:
    """The last point of each line and its value as text."""
    lasts = ((next((p for p in reversed(line.points) if not math.isnan(p.y)), None), line) for line in chart.lines)
    return [(point, number(point.y, chart.share), line) for point, line in lasts if point is not None]


def _end_labels(
    ends: Sequence[tuple[Point, str, Line]], x: _Scale, y: _Scale, top: float, bottom: float
) -> Iterable[Markup]:
    """Beside the lines' ends, moved apart where they would lie on each other."""
    gap = 12.0
    ordered = sorted(ends, key=lambda end: y(end[0].y))
    # What ends early has its label there, and is in nobody's way at the end.
    early = [end for end in ordered if x(end[0].x) < x.end - 40]
    ordered = [end for end in ordered if end not in early]
    places = [y(point.y) for point, _, _ in ordered]
    for _ in range(50):
        for i in range(1, len(places)):
            overlap = gap - (places[i] - places[i - 1])
            if overlap > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
        places = [min(max(place, top + 2), bottom - 2) for place in places]
    ordered, places = [*ordered, *early], [*places, *(y(point.y) for point, _, _ in early)]
    for place, (point, text, line) in zip(places, ordered, strict=True):
        label = {"x": _px(min(x(point.x), x.end) + 6), "y": _px(place + 3.5), "data_group": line.group}
        yield element("text", text, class_=_classes(line.look, "end"), **label)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
