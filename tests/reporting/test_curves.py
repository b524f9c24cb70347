"""Curves keep their extremes and gaps however few points are drawn; ticks are round; estimates are as in textbooks."""

import math
import random

import numpy as np
import pytest

from kdtune.reporting import charts, curves, seeds
from kdtune.reporting.curves import Point

GAP = math.nan


def noise(count: int) -> list[Point]:
    draw = random.Random(0)
    return [Point(step, draw.gauss(2, 1)) for step in range(1, count + 1)]


def test_smoothing_is_a_mean_over_neighbours() -> None:
    points = noise(100)
    values = np.array([point.y for point in points])
    ones = np.ones(9)
    means = np.convolve(values, ones, "same") / np.convolve(np.ones(100), ones, "same")
    assert [point.y for point in curves.smoothed(points, 9)] == pytest.approx(means.tolist())
    assert curves.smoothed(points, 1) == points
    assert curves.window(29) == 1
    assert curves.window(3000) == 101


def test_smoothing_keeps_gaps_and_leaves_them_out() -> None:
    points = [Point(1, 1.0), Point(2, GAP), Point(3, 5.0), Point(4, 6.0)]
    found = [point.y for point in curves.smoothed(points, 3)]
    assert math.isnan(found[1])
    assert [found[0], *found[2:]] == [1.0, 5.5, 5.5]


def test_thinning_keeps_extremes_ends_and_gaps() -> None:
    points = noise(10_000)
    points[1234] = Point(points[1234].x, 50.0)
    points[4321] = Point(points[4321].x, -50.0)
    points[7000] = Point(points[7000].x, GAP)
    kept = curves.thinned(points, 200)
    assert len(kept) <= 210
    assert {points[0], points[1234], points[4321], points[-1]} <= set(kept)
    assert any(math.isnan(point.y) and point.x == points[7000].x for point in kept)
    assert [point.x for point in kept] == sorted({point.x for point in kept})
    assert curves.thinned(points[:150], 200) == points[:150]


def test_bands_are_of_steps_that_all_runs_have() -> None:
    means, band = curves.mean_and_band([{1: 1.0, 2: 2.0, 3: GAP}, {1: 3.0, 3: 1.0, 4: 1.0}])
    assert means[0] == (1, 2.0)
    assert [point.x for point in means] == [1, 3]
    assert math.isnan(means[1].y)
    assert band == [(1, 1.0, 3.0)]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.82, 2.97, ["2.0", "2.2", "2.4", "2.6", "2.8"]),
        (0.0, 40.0, ["0", "10", "20", "30", "40"]),
        (0.0, 2e-3, ["0.0000", "0.0005", "0.0010", "0.0015", "0.0020"]),
        (0.0, 2.1e-5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
        (0.0, 21_000.0, ["0", "5k", "10k", "15k", "20k"]),
        (-1.1, 1.1, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (1.0, 2.3e6, ["0.5M", "1.0M", "1.5M", "2.0M"]),
    ],
)
def test_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    assert charts.tick_labels(charts.ticks(low, high, 5)) == labels


def test_ticks_of_every_range_are_few_and_inside() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        low = draw.choice([0, 1, -1]) * 10 ** draw.uniform(-6, 6)
        high = low + 10 ** draw.uniform(-6, 6) + abs(low) * 1e-6
        found = charts.ticks(low, high, 5)
        room = (high - low) * 1e-6
        assert 2 <= len(found) <= 8
        assert low - room <= found[0] < found[-1] <= high + room
        labels = charts.tick_labels(found)
        assert len(set(labels)) == len(found)
        assert max(map(len, labels)) <= 14


def test_log_ticks_are_powers_of_ten() -> None:
    assert charts.log_ticks(0.05, 30.0) == pytest.approx([0.1, 1, 10])
    assert charts.log_ticks(1e-7, 1e3) == pytest.approx([1e-7, 1e-4, 1e-1, 1e2])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((2.2731, "2.273"), (0.42113, "0.421"), (0.00531, "0.00531"), (5.48e-6, "5.48e-6"), (12345.6, "12,346")),
        *((31.276, "31.28"), (999.94, "999.9"), (0.0, "0"), (-0.5, "-0.500"), (GAP, "-"), (1e-4, "1e-4")),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_student_t_covers_95_percent() -> None:
    for freedom in (1, 2, 5, 30, 31, 60, 1000):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        reach, num = seeds.t_quantile(freedom), 20_000
        xs = [reach * (i + 0.5) / num for i in range(num)]
        inside = 2 * sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in xs) * reach / num
        assert inside == pytest.approx(0.95, abs=5e-5)


def test_estimates_of_seeds() -> None:
    values = [2.1, 2.4, 2.2, 2.9]
    found = seeds.estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert seeds.estimate([1.0]) == (1.0, None, 1)
    # What all seeds have in common is no error of the difference.
    difference = seeds.difference({0: 1.0, 1: 2.0, 2: 9.0}, {2: 8.5, 1: 1.5, 0: 0.5, 7: 0.0})
    assert difference == (0.5, 0.0, 3)
    assert seeds.difference({0: 1.0, 1: 2.0}, {1: 2.0, 2: 3.0}) is None
