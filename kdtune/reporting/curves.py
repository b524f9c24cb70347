"""Curves for a chart: gaps kept, smoothed over neighbours, and few enough points to draw without losing an extreme."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """Of a curve; NaN where the value was not finite, which is a gap."""

    x: float
    y: float


class Span(NamedTuple):
    """Of a band, at a step."""

    x: float
    low: float
    high: float


def window(num_points: int) -> int:
    """Logged steps over which a curve is smoothed: 1 for short ones, then a thirtieth of the run, odd."""
    return 1 if num_points < 30 else num_points // 30 | 1


def smoothed(points: Sequence[Point], width: int) -> list[Point]:
    """Means over `width` points, half of them on each side; at the ends over those of them that there are.

    What is not finite stays a gap, and is left out of its neighbours' means.
    """
    if width == 1:
        return list(points)
    sums, counts = [0.0], [0]
    for point in points:
        finite = not math.isnan(point.y)
        sums.append(sums[-1] + (point.y if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for i, point in enumerate(points):
        low, high = max(0, i - width // 2), min(len(points), i + width // 2 + 1)
        mean = (sums[high] - sums[low]) / (counts[high] - counts[low] or 1)
        means.append(point if math.isnan(point.y) else Point(point.x, mean))
    return means


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points, with the lowest and the highest of each stretch, both ends, and the gaps.

    Args:
        points: in the order of x.
        most: to draw.
    """
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // max(1, most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [i for i, point in enumerate(stretch) if not math.isnan(point.y)]
        indices = {0} if start == 0 else set()
        indices |= {len(stretch) - 1} if start + size >= len(points) else set()
        if finite:
            indices |= {min(finite, key=lambda i: stretch[i].y), max(finite, key=lambda i: stretch[i].y)}
        if len(finite) < len(stretch):
            indices.add(next(i for i, point in enumerate(stretch) if math.isnan(point.y)))
        kept += [stretch[i] for i in sorted(indices)]
    return kept


def points(series: Mapping[int, float]) -> list[Point]:
    """Of the steps of a run."""
    return [Point(step, value) for step, value in series.items()]


def mean_and_band(several: Sequence[Mapping[float, float]]) -> tuple[list[Point], list[Span]]:
    """Of runs that differ in the seed: mean, lowest and highest at the steps that all of them have."""
    steps = [step for step in several[0] if all(step in series for series in several)]
    values = [[series[step] for series in several] for step in steps]
    means = [Point(step, sum(found) / len(found)) for step, found in zip(steps, values, strict=True)]
    band = [Span(step, min(found), max(found)) for step, found in zip(steps, values, strict=True) if not _gap(found)]
    return means, band


def _gap(values: Sequence[float]) -> bool:
    return any(math.isnan(value) for value in values)
