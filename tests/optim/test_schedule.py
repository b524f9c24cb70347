"""The learning rate of each step."""

from __future__ import annotations

import itertools
import warnings

import pytest

from kdtune.optim import LRSchedulerConfig, lr_schedule

PEAK = 0.8


def rates(cfg: LRSchedulerConfig, num_steps: int) -> list[float]:
    rate = lr_schedule(PEAK, cfg, num_steps)
    return [rate(step) for step in range(1, num_steps + 1)]


def test_warm_up_rises_in_equal_parts_and_never_is_zero() -> None:
    found = rates(LRSchedulerConfig(num_warmup_steps=3), 10)
    assert found[:4] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])
    assert max(found) == PEAK


def test_without_warm_up_the_first_step_is_the_peak() -> None:
    for name in ("cosine", "linear", "constant"):
        assert rates(LRSchedulerConfig(name=name, num_warmup_steps=0), 5)[0] == PEAK


def test_linear() -> None:
    found = rates(LRSchedulerConfig(name="linear", num_warmup_steps=2), 6)
    assert found[2:] == pytest.approx([PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.25 * PEAK])


def test_cosine_is_half_way_in_the_middle() -> None:
    found = rates(LRSchedulerConfig(name="cosine", num_warmup_steps=0), 100)
    assert found[50] == pytest.approx(PEAK / 2)
    assert found[25] - found[26] > found[1] - found[2], "flat at the beginning"
    assert all(earlier > later > 0 for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_end(name: str, floor: float) -> None:
    """The last step is one before the floor, so that none is taken with a rate of 0."""
    cfg = LRSchedulerConfig(name=name, num_warmup_steps=10, min_lr_ratio=floor)
    found = rates(cfg, 1000)
    assert found[-1] == pytest.approx(floor * PEAK, abs=0.002 * PEAK)
    assert found[-1] > 0
    assert min(found[10:]) == found[-1] >= floor * PEAK
    assert lr_schedule(PEAK, cfg, 1000)(1001) == pytest.approx(floor * PEAK)
    assert lr_schedule(PEAK, cfg, 1000)(5000) == pytest.approx(floor * PEAK), "a longer run stays there"


def test_constant() -> None:
    assert rates(LRSchedulerConfig(name="constant", num_warmup_steps=1), 4) == [PEAK / 2, PEAK, PEAK, PEAK]
    with pytest.raises(ValueError, match=r"lr_scheduler\.min_lr_ratio=0\.1 says where a decay ends"):
        LRSchedulerConfig(name="constant", min_lr_ratio=0.1)


@pytest.mark.parametrize(("num_steps", "warns"), [(1, True), (3, True), (4, False)])
def test_a_run_that_ends_in_its_warm_up_is_told(num_steps: int, warns: bool) -> None:
    cfg = LRSchedulerConfig(num_warmup_steps=3)
    assert (max(rates_quietly(cfg, num_steps)) < PEAK) == warns
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lr_schedule(PEAK, cfg, num_steps)
    assert bool(caught) == warns


def rates_quietly(cfg: LRSchedulerConfig, num_steps: int) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rates(cfg, num_steps)
