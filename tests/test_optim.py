"""The optimizer's groups, the learning rate of each step, and what a resumed optimizer keeps."""

import pytest
import torch
from torch import nn

from kdtune import optim
from kdtune.optim import LRSchedulerConfig, OptimizerConfig


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_matrices_decay():
    model = make_model()
    optimizer = optim.build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.3, 0.0, 0.0, 0.0]


def test_frozen_parameters_are_left_out():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = optim.build_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak(name):
    schedule = optim.lr_schedule(2.0, LRSchedulerConfig(name=name, num_warmup_steps=4), 10)
    assert [schedule(step) for step in range(1, 6)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_decays_to_the_floor_and_no_step_has_rate_zero():
    linear = optim.lr_schedule(1.0, LRSchedulerConfig(name="linear", num_warmup_steps=0), 4)
    assert [linear(step) for step in range(1, 5)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    cosine = optim.lr_schedule(1.0, LRSchedulerConfig(name="cosine", num_warmup_steps=0, min_lr_ratio=0.1), 1000)
    assert cosine(1) == 1.0
    assert cosine(501) == pytest.approx(0.55)
    assert 0.1 < cosine(1000) < 0.1001
    constant = optim.lr_schedule(1.0, LRSchedulerConfig(name="constant", num_warmup_steps=0), 4)
    assert [constant(step) for step in range(1, 5)] == [1.0] * 4


def test_a_warm_up_that_never_ends_is_warned_about():
    with pytest.warns(UserWarning, match="never reaches"):
        optim.lr_schedule(1.0, LRSchedulerConfig(num_warmup_steps=10), 10)


def test_a_floor_without_a_decay_is_refused():
    with pytest.raises(ValueError, match="min_lr_ratio"):
        LRSchedulerConfig(name="constant", min_lr_ratio=0.1)


def test_a_resumed_optimizer_keeps_its_moments_and_takes_the_new_settings():
    model = make_model()
    before = optim.build_optimizer(model, OptimizerConfig(lr=0.1))
    take_step(model, before)
    after = optim.build_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.7, beta2=0.5))
    after.load_state_dict(before.state_dict())
    weight = model[0].weight
    assert torch.equal(after.state[weight]["exp_avg"], before.state[weight]["exp_avg"])
    matrices = after.param_groups[0]
    assert (matrices["lr"], matrices["weight_decay"], matrices["betas"]) == (0.5, 0.7, (0.9, 0.5))


def test_set_lr_reaches_every_group():
    optimizer = optim.build_optimizer(make_model(), OptimizerConfig())
    optim.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
