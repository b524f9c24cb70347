"""AdamW on a CUDA device: the same bits as torch's, chance that repeats, and a state that lies on the host.

pytest -m gpu tests/gpu
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from kdtune.optim import OptimizerConfig, accumulate_in_float32, adamw, build_optimizer, moments
from kdtune.optim.rounding import join, round_stochastically, split

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WAYS = [(name, precision) for name in moments.BLOCK_SIZES for precision in ("fp32", "stochastic", "nearest")]


def make_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.RMSNorm(512), nn.Linear(512, 300, bias=False)).to(DEVICE, dtype)


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(DEVICE, parameter.dtype)


def train(model, cfg, steps=range(5)):
    optimizer = build_optimizer(model, cfg)
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
    return optimizer


def weights(model):
    return torch.cat([parameter.detach().float().view(-1) for parameter in model.parameters()]).cpu()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(adamw, "BLOCK_ON_GPU", 4096)


def test_nothing_is_lost_and_no_number_stays_none():
    bits = torch.cat([torch.randint(-(2**31), 2**31, (10**6,)), torch.tensor([0x7FFFFFFF])]).to(torch.int32)
    value = bits.to(DEVICE).view(torch.float32)
    weight, rest = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    split(value, weight, rest)
    finite = value.isfinite()
    assert torch.equal(join(weight, rest)[finite], value[finite])
    assert weight[-1].isnan()
    round_stochastically(value, weight, torch.Generator(DEVICE).manual_seed(0))
    assert weight[-1].isnan()
    usual = (value.abs() > 1e-30) & (value.abs() < 1e30)
    assert ((weight[usual].double() - value[usual].double()).abs() <= value[usual].double().abs() * 2**-7).all()


def test_masters_are_those_of_torch_in_float32():
    model = make_model()
    masters = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    ours = build_optimizer(model, OptimizerConfig(lr=0.01, weight_decay=0.0))
    theirs = torch.optim.AdamW(masters, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    for step in range(20):
        set_gradients(model, step)
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float()
        ours.step()
        theirs.step()
    for master, parameter in zip(masters, model.parameters(), strict=True):
        assert torch.equal(ours.master(parameter), master)


@pytest.mark.parametrize(("name", "precision"), [("adamw", "fp32"), ("adamw", "nearest"), *WAYS])
def test_it_is_that_of_the_cpu(name, precision):
    """Up to the kernels' rounding, and what is drawn."""
    on_gpu = make_model()
    on_cpu = copy.deepcopy(on_gpu).cpu()
    before = weights(on_gpu)
    cfg = OptimizerConfig(name=name, precision=precision, lr=0.05)
    train(on_gpu, cfg)
    optimizer = build_optimizer(on_cpu, cfg)
    for step in range(5):
        set_gradients(on_gpu, step)
        for parameter, other in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            parameter.grad = other.grad.cpu()
        optimizer.step()
    assert (weights(on_gpu) - weights(on_cpu)).norm() < 0.03 * (weights(on_gpu) - before).norm()


@pytest.mark.parametrize("name", ["adamw", *moments.BLOCK_SIZES])
def test_chance_repeats_and_does_not_touch_the_device_s(name):
    models = [make_model(), make_model()]
    state = torch.cuda.get_rng_state()
    for model in models:
        train(model, OptimizerConfig(name=name, precision="stochastic"))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "stochastic", "nearest"])
def test_a_state_on_the_host(precision, in_backward):
    cfg = OptimizerConfig(precision=precision, lr=0.05, weight_decay=0.1, offload=True)
    offloaded = make_model()
    on_cpu = copy.deepcopy(offloaded).cpu()
    optimizers = [build_optimizer(offloaded, cfg), build_optimizer(on_cpu, dataclasses.replace(cfg, offload=False))]
    if in_backward:
        optimizers[0].step_in_backward()
    for step in range(5):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step)).to(DEVICE, torch.bfloat16)
        alone = copy.deepcopy(offloaded)
        alone(x).float().square().mean().backward()
        offloaded(x).float().square().mean().backward()
        for parameter, other in zip(on_cpu.parameters(), alone.parameters(), strict=True):
            parameter.grad = other.grad.cpu()
        for optimizer in optimizers:
            optimizer.clip_grad_norm(None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert torch.equal(weights(offloaded), weights(on_cpu))
    kept = [tensor for state in optimizers[0].state.values() for key, tensor in state.items() if key != "step"]
    assert {tensor.device.type for tensor in kept} == {"cpu"}


def test_the_host_s_state_takes_no_memory_of_the_device():
    model = nn.Linear(4096, 4096, bias=False).to(DEVICE, torch.bfloat16)
    optimizer = build_optimizer(model, OptimizerConfig(offload=True))
    model.weight.grad = torch.ones_like(model.weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("precision", ["fp32", "stochastic", "nearest"])
def test_a_step_holds_a_block_at_most(precision):
    """Beyond weights, gradients and state: some float32 copies of a block, however large the parameter is."""
    model = nn.Linear(4096, 4096, bias=False).to(DEVICE, torch.bfloat16)
    optimizer = build_optimizer(model, OptimizerConfig(precision=precision))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 40 * 4096


def test_sums_of_gradients_are_float32():
    model = make_model()
    accumulate_in_float32(model)
    exact = None
    for step in range(8):
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step)).to(DEVICE, torch.bfloat16)
        alone = copy.deepcopy(model)
        alone.zero_grad(set_to_none=True)
        alone(x).float().square().mean().backward()
        model(x).float().square().mean().backward()
        gradient = next(alone.parameters()).grad.double()
        exact = gradient if exact is None else exact + gradient
    found = next(model.parameters()).grad
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-6 * exact.norm()
