"""AdamW against torch's and torchao's, and what must not change its numbers: blocks, resuming, the time of the step."""

from __future__ import annotations

import copy
import importlib
import itertools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import most_allocated
from torch import Tensor, nn

from kdtune import optim
from kdtune.optim import OptimizerConfig, adamw, build_optimizer, moments

NAMES: list[moments.Name] = ["adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8"]
PRECISIONS: list[adamw.Precision] = ["fp32", "stochastic", "nearest"]
WAYS = [
    *((torch.bfloat16, name, precision) for name, precision in itertools.product(NAMES, PRECISIONS)),
    *((torch.float32, name, None) for name in NAMES),
]


class Model(nn.Module):
    """Parameters of one block and of several, of codes and not, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 64)
        self.middle = nn.Linear(64, 64, bias=False)
        self.norm = nn.RMSNorm(64)
        self.odd = nn.Linear(64, 65)
        self.even = nn.Linear(65, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)  # [n, 64]
        hidden = hidden + self.even(self.odd(self.norm(self.middle(hidden))))
        return hidden @ self.embedding.weight.T  # [n, 97]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "BLOCK", 1024)


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(97, (32,), generator=generator)
    torch.nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1)).backward()


def train(model: nn.Module, optimizer: optim.AdamW, steps: range) -> None:
    for step in steps:
        optim.set_lr(optimizer, 0.01 / step)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_same(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[key])
        else:
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]


def groups(parameters: list[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def torch_adamw(parameters: list[Tensor], cfg: OptimizerConfig) -> torch.optim.AdamW:
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(
        groups(parameters, cfg.weight_decay), lr=cfg.lr, betas=betas, eps=cfg.eps, weight_decay=0.0, fused=True
    )


# Against others' optimizers.

CFG = OptimizerConfig(lr=0.01, weight_decay=0.1)


def test_masters_are_those_of_torch_in_float32() -> None:
    """Bit for bit, with the same gradients; the weights of the model are the nearest to them."""
    model = make_model(torch.bfloat16)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    ours, theirs = build_optimizer(model, CFG), torch_adamw(masters, CFG)
    for step in range(60):
        backward(model, step)
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        ours.step()
        theirs.step()
        ours.zero_grad(set_to_none=True)
    for master, parameter in zip(masters, model.parameters(), strict=True):
        state, expected = ours.state[parameter], theirs.state[master]
        assert torch.equal(ours.master(parameter), master)
        for key in adamw.MOMENTS:
            assert torch.equal(state[key], expected[key])
        is_tie = master.view(torch.int32) & 0xFFFF == 2**15
        assert torch.equal(parameter[~is_tie], master.bfloat16()[~is_tie])


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, None), (torch.bfloat16, "nearest")])
def test_without_masters_it_is_torch_s(dtype: torch.dtype, precision: adamw.Precision | None) -> None:
    model = make_model(dtype)
    copied = copy.deepcopy(model)
    ours = build_optimizer(model, OptimizerConfig(lr=0.01, weight_decay=0.1, precision=precision))
    theirs = torch_adamw(list(copied.parameters()), CFG)
    for step in range(50):
        for each, optimizer in ((model, ours), (copied, theirs)):
            backward(each, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert_same(model.state_dict(), copied.state_dict())
    for parameter, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours.state[parameter]["exp_avg_sq"], theirs.state[other]["exp_avg_sq"])


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_4bit", "adamw_fp8"])
def test_in_few_bits_it_is_torchao_s(name: moments.Name, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to values half way between two codes. These gradients have no second moments that torchao rounds to 0."""
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torchao = importlib.import_module("torchao.optim")  # after its noise is off
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # half a minute
    kind = {"adamw_8bit": torchao.AdamW8bit, "adamw_4bit": torchao.AdamW4bit, "adamw_fp8": torchao.AdamWFp8}[name]
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 256 * 32).view(64, 128)) for _ in range(2))
    betas = (CFG.beta1, CFG.beta2)
    optimizer = kind([theirs], lr=CFG.lr, betas=betas, eps=CFG.eps, weight_decay=CFG.weight_decay)
    mine = adamw.AdamW(groups([ours], CFG.weight_decay), lr=CFG.lr, betas=betas, eps=CFG.eps, name=name)
    for step in range(10):
        gradient = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = (gradient.sign() * (0.1 + gradient.abs()) for _ in range(2))
        mine.step()
        optimizer.step()
    assert (ours - theirs).abs().median() < 1e-6
    assert (ours - theirs).norm() < 1e-3 * (ours - torch.linspace(-1, 1, 256 * 32).view(64, 128)).norm()


# The settings of the first optimizer that kdtune had.


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
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.0, beta1=0.8, beta2=0.9, eps=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.data, old.data - 0.1 * parameter.grad / (parameter.grad.abs() + 0.5))
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], 0.2 * parameter.grad)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], 0.1 * parameter.grad.square())


def test_frozen_parameters_and_those_without_a_gradient() -> None:
    model = make_model()
    model.embedding.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]
    model.middle.weight.grad = torch.ones_like(model.middle.weight)
    optimizer.step()
    assert set(optimizer.state) == {model.middle.weight}


def test_the_rate_of_the_next_step() -> None:
    optimizer = build_optimizer(make_model(), OptimizerConfig())
    optim.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_gradients_of_any_layout() -> None:
    """A matrix's gradient may come transposed."""
    one, other = nn.Parameter(torch.ones(64, 128)), nn.Parameter(torch.ones(64, 128))
    gradient = torch.randn(128, 64)
    one.grad, other.grad = gradient.T, gradient.T.contiguous()
    for parameter in (one, other):
        adamw.AdamW(groups([parameter], 0.0), lr=0.1, betas=(0.9, 0.95), eps=1e-8).step()
    assert torch.equal(one, other)


# Small steps of bf16 weights.


def move(precision: adamw.Precision, *, lr: float, steps: int = 100, seed: int = 0) -> Tensor:
    """Weights between 1 and 2, after steps of `lr` downwards: Adam's first ones are of that size."""
    weight = nn.Parameter((1 + torch.arange(2**14) % 128 / 128).bfloat16())
    before = weight.detach().clone()
    optimizer = adamw.AdamW(groups([weight], 0.0), lr=lr, betas=(0.9, 0.95), eps=1e-8, precision=precision, seed=seed)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return before.double() - weight.detach().double()


def test_steps_that_rounding_would_lose() -> None:
    """A hundred of a 25th of a bf16 number's distance: four of these in all."""
    step = 2**-7 / 25
    assert (move("nearest", lr=step) == 0).all()
    kept = move("fp32", lr=step)
    torch.testing.assert_close(kept, torch.full_like(kept, 100 * step), rtol=0, atol=2**-8)
    by_chance = move("stochastic", lr=step)
    assert by_chance.mean().item() == pytest.approx(100 * step, rel=0.02)
    assert 0.5 < by_chance.std().item() / (2**-7 * (100 * 0.04 * 0.96) ** 0.5) < 1.5, "of a sum of independent draws"


def test_chance_depends_on_seed_step_and_parameter() -> None:
    first, again, other = (move("stochastic", lr=1e-3, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    one, two = (nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = adamw.AdamW(groups([one, two], 0.0), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, precision="stochastic")
    for parameter in (one, two):
        parameter.grad = torch.ones_like(parameter)
    random_state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), random_state), "the process's is left alone"
    assert not torch.equal(one, two)
    moved = one.detach().clone()
    for parameter in (one, two):
        parameter.data.fill_(1)
    optimizer.step()
    assert not torch.equal(one, moved)


def test_a_moment_that_chance_rounds_forgets() -> None:
    """With a beta2 of 0.999, the nearest bf16 number to the decayed moment is the moment itself."""
    found = {}
    for precision in PRECISIONS:
        weight = nn.Parameter(torch.ones(1024, dtype=torch.bfloat16))
        optimizer = adamw.AdamW(groups([weight], 0.0), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, precision=precision)
        for step in range(400):
            weight.grad = torch.full_like(weight, float(step == 0))
            optimizer.step()
        found[precision] = optimizer.state[weight]["exp_avg_sq"].double().mean().item() / 0.001
    assert found["fp32"] == pytest.approx(0.999**399, rel=1e-3)
    assert found["stochastic"] == pytest.approx(0.999**399, rel=0.02)
    assert found["nearest"] == pytest.approx(1, rel=0.01)


def test_a_row_without_a_gradient_does_not_leap() -> None:
    """After values of all sizes in a block the gradient is 0, as of an embedding's row that a step has not seen."""
    for name in NAMES:
        weight = nn.Parameter(torch.zeros(16, 256))
        optimizer = adamw.AdamW(groups([weight], 0.0), lr=1.0, betas=(0.9, 0.95), eps=1e-8, name=name)
        weight.grad = torch.logspace(-5, 0, 256).repeat(16, 1)
        optimizer.step()
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert (weight - before).abs().max() < 2.5, name


# Resuming.


@pytest.mark.parametrize(("dtype", "name", "precision"), WAYS)
def test_resumed_is_uninterrupted(
    dtype: torch.dtype, name: moments.Name, precision: adamw.Precision | None, tmp_path: Path
) -> None:
    cfg = OptimizerConfig(name=name, precision=precision, weight_decay=0.1)
    model = make_model(dtype)
    optimizer = build_optimizer(model, cfg, seed=7)
    train(model, optimizer, range(1, 4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, range(4, 7))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Model().to(dtype)
    resumed.load_state_dict(saved["model"])
    restored = build_optimizer(resumed, cfg, seed=7)
    restored.load_state_dict(saved["optimizer"])
    train(resumed, restored, range(4, 7))
    assert_same(model.state_dict(), resumed.state_dict())
    assert_same(optimizer.state_dict()["state"], restored.state_dict()["state"])


def test_resuming_takes_the_moments_and_keeps_the_settings() -> None:
    old_model, new_model = make_model(), make_model()
    old = build_optimizer(old_model, OptimizerConfig(lr=0.1, weight_decay=0.5, beta1=0.5))
    backward(old_model, 0)
    old.step()
    new = build_optimizer(new_model, OptimizerConfig(lr=0.3, weight_decay=0.7, beta1=0.6))
    new.load_state_dict(old.state_dict())
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in new.param_groups] == [
        (0.3, 0.7, (0.6, 0.95)),
        (0.3, 0.0, (0.6, 0.95)),
    ]
    for parameter, old_parameter in zip(new_model.parameters(), old_model.parameters(), strict=True):
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[old_parameter]["exp_avg"])
        assert new.state[parameter]["step"] == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resuming_from_torch_s_optimizer(precision: adamw.Precision) -> None:
    """That of earlier versions of kdtune, whose checkpoints go on."""
    model = make_model(torch.bfloat16)
    old = torch_adamw(list(model.parameters()), CFG)
    backward(model, 0)
    old.step()
    new = build_optimizer(model, OptimizerConfig(precision=precision))
    new.load_state_dict(old.state_dict())
    for parameter in model.parameters():
        assert new.state[parameter]["step"] == 1
        for key in adamw.MOMENTS:
            assert torch.equal(new.state[parameter][key].float(), old.state[parameter][key].float())


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_resuming_with_another_format(name: moments.Name, to: moments.Name) -> None:
    model = make_model(torch.bfloat16)
    old = build_optimizer(model, OptimizerConfig(name=name, precision="fp32"))
    train(model, old, range(1, 4))
    new = build_optimizer(model, OptimizerConfig(name=to))
    new.load_state_dict(old.state_dict())
    for parameter in model.parameters():
        kept = [
            moments.read(o.state[parameter]["exp_avg"], o.state[parameter].get("exp_avg_scale"), signed=True)
            for o in (old, new)
        ]
        assert (kept[0].view(-1) - kept[1].view(-1)).norm() <= 0.2 * kept[0].norm()
        assert ("rest" in new.state[parameter]) == (to == "adamw")
        assert to != "adamw" or torch.equal(new.state[parameter]["rest"], old.state[parameter]["rest"])


# Steps in the backward.


@pytest.mark.parametrize(("dtype", "name", "precision"), WAYS)
def test_in_the_backward_it_is_the_same_step(
    dtype: torch.dtype, name: moments.Name, precision: adamw.Precision | None
) -> None:
    cfg = OptimizerConfig(name=name, precision=precision, weight_decay=0.1)
    after, within = make_model(dtype), make_model(dtype)
    optimizers = [build_optimizer(model, cfg) for model in (after, within)]
    optimizers[1].step_in_backward()
    for step in range(1, 5):
        norms = []
        for model, optimizer in zip((after, within), optimizers, strict=True):
            optim.set_lr(optimizer, 0.01 / step)
            backward(model, step)
            norms.append(optimizer.clip_grad_norm(None))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert torch.equal(*norms)
        assert norms[0] > 0
    assert_same(after.state_dict(), within.state_dict())
    assert_same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


def peak(model: nn.Module, in_backward: bool) -> int:
    """Bytes beyond parameters and moments that a backward and its step hold at most, by the allocator's record."""
    optimizer = build_optimizer(model, OptimizerConfig())
    if in_backward:
        optimizer.step_in_backward()

    def step() -> None:
        model(torch.ones(1, 256)).sum().backward()
        optimizer.clip_grad_norm(None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return most_allocated(step)


def test_gradients_are_gone_at_once() -> None:
    """Of twelve matrices and a larger one, the largest alone is there at one time."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)), nn.Linear(256, 512, bias=False))
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert peak(copy.deepcopy(model), in_backward=False) > gradients
    assert largest <= peak(copy.deepcopy(model), in_backward=True) < 1.1 * largest


# The norm of the gradient, and its sum.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_clipping(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = build_optimizer(model, OptimizerConfig())
    backward(model, 0)
    gradients = [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]
    expected = torch.cat([gradient.view(-1) for gradient in gradients]).norm().item()
    found = optimizer.clip_grad_norm(None)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-6), "torch's own has three digits of a bf16 gradient's norm"
    assert optimizer.clip_grad_norm(2 * expected).item() == found.item(), "nothing to shrink"
    optimizer.clip_grad_norm(expected / 3)
    assert optimizer.clip_grad_norm(None).item() == pytest.approx(
        expected / 3, rel=1e-4 if dtype == torch.float32 else 2e-3
    )


def test_sums_of_gradients_are_float32() -> None:
    """64 micro-batches in bf16 are wrong by percents, in float32 by the rounding of each alone."""
    errors = {}
    for in_float32 in (False, True):
        model = make_model(torch.bfloat16)
        optimizer = build_optimizer(model, OptimizerConfig())
        if in_float32:
            optim.accumulate_in_float32(model)
        exact = {parameter: torch.zeros_like(parameter, dtype=torch.float64) for parameter in model.parameters()}
        for step in range(64):
            alone = copy.deepcopy(model)
            alone.zero_grad(set_to_none=True)
            optim.accumulate_in_float32(alone)  # for the parameter that is used twice
            backward(alone, step)
            for total, parameter in zip(exact.values(), alone.parameters(), strict=True):
                assert parameter.grad is not None
                total += parameter.grad.double()
            backward(model, step)
        gradients = {parameter: parameter.grad for parameter in exact if parameter.grad is not None}
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32 if in_float32 else torch.bfloat16}
        errors[in_float32] = max(((gradients[p].double() - exact[p]).norm() / exact[p].norm()).item() for p in exact)
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
    assert errors[False] > 5e-3
    assert errors[True] < 1e-6


@pytest.mark.parametrize(("dtype", "name", "precision"), WAYS)
def test_gradients_may_be_wider_than_weights(
    dtype: torch.dtype, name: moments.Name, precision: adamw.Precision | None
) -> None:
    """One micro-batch whose gradient is float32 is the step of the same gradient in bf16."""
    models = [make_model(dtype), make_model(dtype)]
    optim.accumulate_in_float32(models[1])
    optimizers = [build_optimizer(model, OptimizerConfig(name=name, precision=precision)) for model in models]
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
                parameter.grad = gradient.to(parameter.grad_dtype)
            optimizer.step()
    assert_same(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_on_copies_are_the_same(
    precision: adamw.Precision, in_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's host computes, without a GPU: weights come back, the state stays."""
    copied = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(
        adamw.AdamW,
        "_copies",
        lambda self, parameter: (
            adamw._Copies(parameter.detach().clone(), parameter.grad.clone(), copied) if self._offload else None
        ),
    )
    here, there = make_model(torch.bfloat16), make_model(torch.bfloat16)
    optimizers = [
        build_optimizer(model, OptimizerConfig(precision=precision, offload=offload))
        for model, offload in ((here, False), (there, True))
    ]
    if in_backward:
        optimizers[1].step_in_backward()
    for model, optimizer in zip((here, there), optimizers, strict=True):
        train(model, optimizer, range(1, 4))
    assert_same(here.state_dict(), there.state_dict())
    assert_same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


# On meta, for a plan.


@pytest.mark.parametrize(("dtype", "name", "precision"), WAYS)
def test_bytes_on_meta(dtype: torch.dtype, name: moments.Name, precision: adamw.Precision | None) -> None:
    cfg = OptimizerConfig(name=name, precision=precision)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)).to(dtype)
    optim.accumulate_in_float32(model)
    optimizer = build_optimizer(model, cfg)
    optimizer.step_in_backward()
    model(torch.ones(2, 256, dtype=dtype, device="meta")).sum().backward()
    assert optimizer.clip_grad_norm(None).is_meta
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    assert all(tensor.is_meta for tensor in tensors)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert sum(tensor.nbytes for tensor in tensors) == weights * optim.bytes_per_weight(cfg, dtype)
