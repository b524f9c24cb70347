"""AdamW over the right parameters, and the learning rate of each step."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn

from kdtune.optim import LRSchedulerConfig, OptimizerConfig, build_optimizer, lr_schedule, set_lr

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


# The optimizer.


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.RMSNorm(4))


def test_weight_decay_is_for_matrices() -> None:
    """Without a gradient all that moves a weight is its decay."""
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5)).step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1
        torch.testing.assert_close(parameter, before[name] * kept)


def test_first_step_by_hand() -> None:
    model = make_model()
    cfg = OptimizerConfig(lr=0.1, weight_decay=0.0, beta1=0.8, beta2=0.9, eps=0.5)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, cfg)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.data, old.data - 0.1 * parameter.grad / (parameter.grad.abs() + 0.5))
    state = optimizer.state[next(model.parameters())]
    gradient = next(model.parameters()).grad
    assert gradient is not None
    torch.testing.assert_close(state["exp_avg"], 0.2 * gradient)
    torch.testing.assert_close(state["exp_avg_sq"], 0.1 * gradient.square())


def test_frozen_parameters_are_left_out() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_the_rate_of_the_next_step() -> None:
    optimizer = build_optimizer(make_model(), OptimizerConfig())
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_resuming_takes_the_moments_and_keeps_the_settings() -> None:
    old_model, new_model = make_model(), make_model()
    old = build_optimizer(old_model, OptimizerConfig(lr=0.1, weight_decay=0.5, beta1=0.5))
    for parameter in old_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    new = build_optimizer(new_model, OptimizerConfig(lr=0.3, weight_decay=0.7, beta1=0.6))
    new.load_state_dict(old.state_dict())
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in new.param_groups] == [
        (0.3, 0.7, (0.6, 0.95)),
        (0.3, 0.0, (0.6, 0.95)),
    ]
    for parameter, old_parameter in zip(new_model.parameters(), old_model.parameters(), strict=True):
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[old_parameter]["exp_avg"])
        assert torch.equal(new.state[parameter]["step"], torch.tensor(1.0))
