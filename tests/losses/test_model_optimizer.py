"""Model Optimizer's own code beside ours, where it is installed: values and gradients.

    pip install -e '.[dev,peers]' && pip install --no-deps megatron-core==0.16.1

What it gave on fixed numbers is in `test_goldens.py` and `test_hidden.py`, which need none of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import identity, loss_of_logits
from torch import Tensor, nn

from kdtune import checkpoint, data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.losses import IGNORE, CELossConfig, HiddenLoss, HiddenLossConfig, KDLossConfig, Pair, Targets
from kdtune.teacher import LiveTeacher

has_core = importlib.util.find_spec("modelopt") is not None
pytestmark = pytest.mark.skipif(not has_core, reason="nvidia-modelopt is not installed")
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core, which Model Optimizer's plugin needs, is not"
)


def rand(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([[3, IGNORE, 0, 11, IGNORE], [IGNORE, 7, 2, 2, 5]])
COUNTED = LABELS != IGNORE
NUM = int(COUNTED.sum())
STUDENT, TEACHER = rand(2, 5, 12, seed=0), rand(2, 5, 12, seed=1)  # of logits, and of hidden states


def masked_mean(loss: Tensor) -> Tensor:
    return loss[COUNTED].sum() / NUM


def check(ours: Tensor, theirs: Tensor, mine: Tensor, other: Tensor) -> None:
    """Values, and gradients for the student's numbers."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    (grad,), (expected,) = torch.autograd.grad(ours, mine), torch.autograd.grad(theirs, other)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_logits(temperature: float) -> None:
    """Of its core, with T^2."""
    from modelopt.torch.distill import LogitsDistillationLoss

    mine, other = (STUDENT.clone().requires_grad_() for _ in range(2))
    ours = loss_of_logits(mine, TEACHER, LABELS, NUM, ce_weight=0, kd_weight=1, temperature=temperature)
    theirs = masked_mean(LogitsDistillationLoss(temperature, reduction="none")(other, TEACHER))
    check(ours.total, theirs, mine, other)


@needs_megatron
@pytest.mark.parametrize(("name", "their_name"), [("mse", "MSELoss"), ("cosine", "HiddenStateCosineLoss")])
def test_hidden_states(name: Any, their_name: str) -> None:
    """Theirs are [s, b, d], and give [b, s]."""
    from modelopt.torch.distill.plugins import megatron

    mine, other = (STUDENT.clone().requires_grad_() for _ in range(2))
    (ours,) = HiddenLoss([Pair("s", "t", name)])({"s": mine}, targets({"t": TEACHER}), LABELS, NUM)
    loss = getattr(megatron, their_name)(CONFIG)
    theirs = loss(other.transpose(0, 1).contiguous(), TEACHER.transpose(0, 1).contiguous())[0]
    check(ours, masked_mean(theirs), mine, other)


@needs_megatron
@pytest.mark.parametrize("scale", [None, 1.0, 2.5])
@pytest.mark.parametrize("names", [["mse"], ["cosine", "mse"]])
def test_balancer(names: list[Any], scale: float | None) -> None:
    """By the settings of docs/hidden_states.md; None is its `skip_lm_loss`."""
    from modelopt.torch.distill.plugins import megatron

    mine, other = (STUDENT.clone().requires_grad_() for _ in range(2))
    kd = KDLossConfig(weight=scale or 1.0, balance=scale is not None, scale_by_temperature_squared=False)
    settings = {"kd_ratio": 1.0} if scale is None else {"kd_ratio": 0.5, "ce_loss": CELossConfig(weight=2.0)}
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    cfg = recipe.Config(**settings, kd_loss=kd, hidden_loss=HiddenLossConfig(weight=scale or 1.0, balance=True))
    batch = data.Batch(LABELS.clamp(min=0), LABELS, torch.arange(5).expand(2, 5))
    asked = targets({"t": TEACHER})
    distances = HiddenLoss([Pair("s", "t", name) for name in names])({"s": mine}, asked, LABELS, NUM)
    ours = recipe.objective(cfg, mine, identity(STUDENT), asked, batch, NUM, 1.0, distances).total

    across = [x.transpose(0, 1).contiguous() for x in (other, TEACHER)]
    known = {"mse": megatron.MSELoss, "cosine": megatron.HiddenStateCosineLoss}
    found = {f"{name}_{i}": masked_mean(known[name](CONFIG)(*across)[0]) for i, name in enumerate(names)}
    kl = F.kl_div(other.log_softmax(-1), TEACHER.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    found["LogitsKLLoss_0"] = masked_mean(kl)  # its own wants process groups
    found["student_loss"] = masked_mean(F.cross_entropy(other.transpose(1, 2), LABELS, reduction="none"))
    balancer = megatron.LogitsAndIntermediatesLossBalancer(scale or 1.0, skip_original_loss=scale is None)
    check(ours, balancer(found)["kd_loss"], mine, other)


CONFIG = SimpleNamespace(sequence_parallel=False, tensor_model_parallel_size=1)


def targets(captured: dict[str, Tensor]) -> Targets:
    return Targets(TEACHER, identity(TEACHER), captured)


class Distance(nn.modules.loss._Loss):
    """By labelled token, of what transformers' layers return."""

    def forward(self, student: Any, teacher: Any) -> Tensor:
        student, teacher = (x[0] if isinstance(x, tuple) else x for x in (student, teacher))
        return ((student - teacher) ** 2).mean(-1)


@pytest.mark.parametrize("layers", [(1,), (0, 1), (0, 2)])
def test_layerwise(
    layers: tuple[int, ...], oracle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`layerwise_kd`: the layers named are trained from the teacher's inputs, and nothing else."""
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.loss_balancers import DistillationLossBalancer

    class Mean(DistillationLossBalancer):
        def forward(self, loss: dict[str, Tensor]) -> Tensor:
            return sum(loss.values()) / len(loss)

    student, teacher = oracle("llama").double(), oracle("llama").double()
    norm = type(student.model.norm)  # its own is in float32, whatever comes in
    monkeypatch.setattr(
        norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    )
    for parameter in student.parameters():
        parameter.data += 0.1 * rand(*parameter.shape, seed=3)
    for role, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / role)
    tokens = torch.randint(97, (2, 5), generator=torch.Generator().manual_seed(0))

    criterion = {(f"model.layers.{i}", f"model.layers.{i}"): Distance() for i in layers}
    settings = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": Mean()}
    student.config.use_cache = teacher.config.use_cache = False
    model = mtd.convert(student, mode=[("layerwise_kd", settings)])
    model(tokens)
    theirs = model.compute_kd_loss(loss_reduction_fn=masked_mean)
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters() if "_teacher" not in name}

    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3))]
    wanted = {f"model.layers.{i}": "mse" for i in layers}
    pairs = [Pair(name, name, wanted.get(name)) for name in names]  # type: ignore[arg-type]
    mine, frozen = (
        checkpoint.load_model(tmp_path / role, dtype=torch.float64, device="cpu") for role in ("student", "teacher")
    )
    mine.beside = HiddenLoss(pairs, inputs="teacher")
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    cfg = recipe.Config(kd_ratio=1.0, kd_loss=KDLossConfig(weight=0.0), hidden_loss=HiddenLossConfig(inputs="teacher"))
    batch = data.Batch(tokens, LABELS, torch.arange(5).expand(2, 5))
    logged = recipe.forward_backward(cfg, mine, LiveTeacher(frozen), [batch], NUM)
    torch.testing.assert_close(logged[0], theirs.detach(), rtol=1e-9, atol=0)
    for name, parameter in mine.named_parameters():
        of_theirs = expected.get(name)
        if of_theirs is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, of_theirs, rtol=1e-8, atol=1e-12, msg=name)
