"""Distances between hidden states: against their definitions in float64, and against what Model Optimizer computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import identity
from test_goldens import NV_LABELS, NV_STUDENT, NV_TEACHER
from torch import Tensor

from kdtune import data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.losses import IGNORE, CELossConfig, HiddenLoss, HiddenLossConfig, KDLossConfig, Pair, Targets, pairs_of
from kdtune.losses import hidden as engine

EPS = 1e-12  # of F.cosine_embedding_loss, by which Model Optimizer computes

# By definition, of one token: s and t are lists of numbers.
DEFINITIONS = {
    "cosine": lambda s, t: 1 - (s @ t) / (s @ s).sqrt() / (t @ t).sqrt(),
    "mse": lambda s, t: ((s - t) @ (s - t)) / len(s),
    "normalized_mse": lambda s, t: ((s - t) @ (s - t)) / (t @ t),
    "l1": lambda s, t: sum(abs(x) for x in s - t) / len(s),
    "smooth_l1": lambda s, t: sum(x * x / 2 if abs(x) < 1 else abs(x) - 0.5 for x in s - t) / len(s),
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d: int = 6, d_t: int = 6, pairs: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """Outputs of student and teacher, [3, 5, d], and labels of 3 rows, of which one has none."""
    student = {f"s{i}": rand(3, 5, d, seed=i).to(dtype).requires_grad_() for i in range(pairs)}
    teacher = {f"t{i}": rand(3, 5, d_t, seed=9 + i).to(dtype) for i in range(pairs)}
    labels = torch.tensor([[IGNORE, 3, 4, IGNORE, 5], [7, IGNORE, 1, 2, 0], [IGNORE] * 5])
    return student, teacher, labels


def targets(captured: dict[str, Tensor]) -> Targets:
    first = next(iter(captured.values()))
    return Targets(first, identity(first), captured)


def by_definition(loss: HiddenLoss, student: Any, teacher: Any, labels: Tensor, num_tokens: int) -> Tensor:
    found = []
    for i, pair in enumerate(loss.pairs):
        total = 0
        for row, column in (labels != IGNORE).nonzero().tolist():
            s, t = student[pair.student][row, column], teacher[pair.teacher][row, column]
            if loss.projections:
                own = loss.projections[i % len(loss.projections)]
                s = own.weight.to(s.dtype) @ s + own.bias.to(s.dtype)
            total = total + DEFINITIONS[pair.distance](s.double(), t.double())
        found.append(total / num_tokens)
    return torch.stack(found)


@pytest.mark.parametrize("projection", [None, "shared", "per_pair"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_values_and_gradients(name: Any, projection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hidden states, and of projections, in several blocks."""
    monkeypatch.setattr(engine, "BLOCK", 24)  # four positions at a time
    student, teacher, labels = problem(d_t=6 if projection is None else 8)
    teacher = {key: 2 * value for key, value in teacher.items()}  # differences on both sides of 1
    loss = HiddenLoss([Pair("s0", "t1", name), Pair("s1", "t0", name)], projection, (6, 8)).double()
    inputs = [*student.values(), *loss.parameters()]
    weights = torch.tensor([0.3, 1.7], dtype=torch.float64)
    found, expected = loss(student, targets(teacher), labels, 11), by_definition(loss, student, teacher, labels, 11)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for grad, other in zip(
        torch.autograd.grad(found @ weights, inputs), torch.autograd.grad(expected @ weights, inputs), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-14)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("name", DEFINITIONS)
def test_bf16_is_compared_in_float32(name: Any) -> None:
    """No less exactly than the numbers themselves are."""
    student, teacher, labels = problem(d=512, d_t=512, dtype=torch.bfloat16)
    loss = HiddenLoss([Pair("s0", "t0", name)])
    found = loss(student, targets(teacher), labels, 7)
    expected = by_definition(loss, student, teacher, labels, 7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (grad,), (other,) = (torch.autograd.grad(value.sum(), student["s0"]) for value in (found, expected))
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, other, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_zeros_and_equals_have_a_gradient(name: Any) -> None:
    """Padding of a slice is zeros on both sides; a teacher may be what the student is."""
    student, _, labels = problem()
    s = student["s0"].detach().clone()
    s[0, 1] = 0  # labelled
    t = s.clone()
    t[1, 0] = 0
    s.requires_grad_()
    value = HiddenLoss([Pair("s0", "t0", name)])({"s0": s}, targets({"t0": t}), labels, 1)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), s)[0].isfinite().all()


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_teacher_of_the_labelled_positions_alone(name: Any) -> None:
    """As a cache of hidden states has it. At the others the teacher is 0, of which a student is infinitely many."""
    student, teacher, labels = problem()
    student = {key: (100 * value).detach().requires_grad_() for key, value in student.items()}
    loss = HiddenLoss([Pair("s0", "t0", name)])
    whole = loss(student, targets(teacher), labels, 7)
    part = loss(student, targets({"t0": teacher["t0"][labels != IGNORE]}), labels, 7)
    assert part.isfinite().all()
    assert torch.equal(whole, part)
    (of_whole,), (of_part,) = (torch.autograd.grad(value.sum(), student["s0"]) for value in (whole, part))
    assert torch.equal(of_whole, of_part)


def test_all_tokens_but_padding() -> None:
    """Whether they have a label or not."""
    student, teacher, labels = problem()
    loss = HiddenLoss([Pair("s0", "t1", "mse"), Pair("s1", "t0", "l1")], tokens="all")
    lengths = torch.tensor([5, 2, 0])
    everywhere = torch.zeros_like(labels)
    for given, counts in ((lengths, torch.arange(5) < lengths[:, None]), (None, everywhere == 0)):
        found = loss(student, targets(teacher), labels, 11, given)
        expected = by_definition(loss, student, teacher, everywhere.masked_fill(~counts, IGNORE), 11)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_no_label_no_value() -> None:
    """But a graph, which several processes need."""
    student, teacher, labels = problem()
    loss = HiddenLoss([Pair("s0", "t0", "cosine")], "shared", (6, 6)).double()
    value = loss(student, targets(teacher), torch.full_like(labels, IGNORE), 7)
    assert value.tolist() == [0]
    assert all(not grad.any() for grad in torch.autograd.grad(value.sum(), [student["s0"], *loss.parameters()]))


# Model Optimizer 0.47's plugin for Megatron, run on these numbers (its formulas are F.mse_loss(...).mean(-1) and
# F.cosine_embedding_loss), with the sum of |d loss / d student|.


@pytest.mark.parametrize(
    ("name", "value", "gradient"), [("mse", 11.862234116, 5.4787), ("cosine", 0.967631996, 0.40975)]
)
def test_values_of_model_optimizer(name: Any, value: float, gradient: float) -> None:
    student = NV_STUDENT.clone().requires_grad_()
    loss = HiddenLoss([Pair("s", "t", name)])
    (found,) = loss({"s": student}, targets({"t": NV_TEACHER}), NV_LABELS, 5)
    assert found.item() == pytest.approx(value, rel=1e-6)
    assert torch.autograd.grad(found, student)[0].abs().sum().item() == pytest.approx(gradient, rel=2e-5)


def recipe_objective(student: Tensor, pairs: list[str], **settings: Any) -> Tensor:
    """Through the recipe, of logits that are hidden states, too."""
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    batch = data.Batch(NV_LABELS.clamp(min=0), NV_LABELS, torch.arange(3).expand(2, 3))
    cfg = recipe.Config(**settings)
    loss = HiddenLoss([Pair("s", "t", name) for name in pairs])
    asked = targets({"t": NV_TEACHER})
    distances = loss({"s": student}, asked, NV_LABELS, 5)
    return recipe.objective(cfg, student, identity(NV_STUDENT), asked, batch, 5, 1.0, distances)


def megatron(student: Tensor, pairs: list[str], scale: float | None) -> Tensor:
    """`LogitsAndIntermediatesLossBalancer`, written out: `kd_loss_scale`, or None for `skip_lm_loss`."""
    s, t, labels = student.double(), NV_TEACHER.double(), NV_LABELS
    mask = labels != IGNORE
    lm = F.cross_entropy(s[mask], labels[mask])
    logits = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)[mask].mean()
    each = {
        "mse": F.mse_loss(s, t, reduction="none").mean(-1),
        "cosine": F.cosine_embedding_loss(s.flatten(0, 1), t.flatten(0, 1), t.new_ones(1), reduction="none").view(2, 3),
    }
    intermediate = sum(each[name][mask].mean() for name in pairs) / len(pairs)
    intermediate = intermediate * (logits.detach() / intermediate.detach())
    kd = logits + intermediate
    if scale is None:
        return kd
    return lm + scale * kd * (lm.detach() / kd.detach())


@pytest.mark.parametrize("pairs", [["cosine"], ["mse"], ["mse", "cosine"]])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0])
def test_model_optimizers_balancer(scale: float | None, pairs: list[str]) -> None:
    """By the settings of docs/hidden_states.md."""
    settings: dict[str, Any]
    if scale is None:
        settings = {"kd_ratio": 1.0, "kd_loss": KDLossConfig(scale_by_temperature_squared=False)}
        hidden = HiddenLossConfig(balance=True)
    else:
        settings = {"kd_ratio": 0.5, "ce_loss": CELossConfig(weight=2.0)}
        settings["kd_loss"] = KDLossConfig(weight=scale, balance=True, scale_by_temperature_squared=False)
        hidden = HiddenLossConfig(weight=scale, balance=True)
    student = NV_STUDENT.clone().requires_grad_()
    found = recipe_objective(student, pairs, hidden_loss=hidden, **settings).total
    expected = megatron(student, pairs, scale)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    grad, other = (torch.autograd.grad(value, student)[0] for value in (found, expected))
    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    if scale == 2 and pairs == ["cosine"]:  # what its own code gave
        assert found.item() == pytest.approx(12.146859169, rel=1e-6)
        assert grad.abs().sum().item() == pytest.approx(5.061368942, rel=1e-5)


def test_raw_terms_and_factors_are_logged() -> None:
    """Whatever they were multiplied by."""
    settings = {"kd_ratio": 0.5, "ce_loss": CELossConfig(weight=2.0), "kd_loss": KDLossConfig(weight=2.0, balance=True)}
    hidden = HiddenLossConfig(weight=2.0, balance=True)
    loss = recipe_objective(NV_STUDENT, ["mse", "cosine"], hidden_loss=hidden, **settings)
    total, ce, kd, balanced_kd, *rest = loss.logged().tolist()
    assert (ce, kd) == pytest.approx((4.048953, 2.720567226), rel=1e-6)
    described = HiddenLoss([Pair("s", "t", "mse"), Pair("z", "t", "cosine")]).describe(rest, balance=True)
    assert described["hidden_loss/s"] == pytest.approx(11.862234116, rel=1e-6)
    assert described["hidden_loss/z"] == pytest.approx(0.967631996, rel=1e-6)
    assert described["hidden_loss"] == pytest.approx((11.862234116 + 0.967631996) / 2, rel=1e-6)
    assert described["hidden_factor"] * described["hidden_loss"] == pytest.approx(balanced_kd, rel=1e-6)
    assert total == pytest.approx(ce + balanced_kd + described["hidden_factor"] * described["hidden_loss"], rel=1e-6)
    twice = HiddenLoss([Pair("s", "t", "mse"), Pair("s", "t", "cosine")]).describe(rest, balance=False)
    assert list(twice) == ["hidden_loss", "hidden_loss/s:t:mse", "hidden_loss/s:t:cosine"]


# Names.

STUDENT = ["model.embed_tokens", *(f"model.layers.{i}{part}" for i in range(4) for part in (".mlp", "")), "model.norm"]
TEACHER = ["model.embed_tokens", *(f"model.layers.{i}{part}" for i in range(8) for part in (".mlp", "")), "model.norm"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"student": "model.norm", "teacher": "model.norm"}, [("model.norm", "model.norm", "cosine")]),
        (
            {"student": "model.layers.{0..2}.mlp", "teacher": "model.layers.{1..7..3}", "loss": "l1"},
            [(f"model.layers.{i}.mlp", f"model.layers.{1 + 3 * i}", "l1") for i in range(3)],
        ),
        (
            {"student": "model.layers.{3..3}", "teacher": "model.layers.7"},
            [("model.layers.3", "model.layers.7", "cosine")],
        ),
    ],
)
def test_ranges(given: dict[str, str], expected: list[Any]) -> None:
    assert pairs_of(HiddenLossConfig(pairs=[given]), STUDENT, TEACHER) == expected


SAME = {"student": "model.norm", "teacher": "model.norm"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "hidden_loss.pairs is empty"),
        ({"pairs": [{"student": "model.norm"}]}, r"pairs\[0\] has student\. A pair is"),
        ({"pairs": [SAME | {"losses": "mse"}]}, r"has student, teacher, losses\."),
        ({"pairs": [SAME | {"loss": "mes"}]}, r"pairs\[0\].loss=mes: no such distance. Did you mean mse\?"),
        ({"pairs": [SAME, SAME | {"student": "norm"}]}, r"pairs\[1\].student=norm.* Did you mean model.norm\?"),
        (
            {"pairs": [SAME | {"teacher": "model.layers.8.mlp"}]},
            r"teacher=model.layers.8.mlp: .*mean model.layers.\d.mlp\? The layers are 0 to 7\.",
        ),
        ({"pairs": [SAME | {"student": "model.layers.{0..2}"}]}, "are 3 modules and model.norm are 1"),
        ({"pairs": [SAME | {"student": "model.layers.{2..0}"}]}, "the range is empty"),
        ({"pairs": [SAME | {"student": "model.layers.{0..2..0}"}]}, "the range is empty"),
        ({"pairs": [SAME | {"student": "model.layers.{0-2}"}]}, "a name may have one range"),
        ({"pairs": [SAME | {"student": "{0..1}.{0..1}"}]}, "a name may have one range"),
        ({"pairs": [SAME, SAME]}, "model.norm with model.norm twice"),
        ({"pairs": [SAME], "projection_init": "orthogonal"}, "is about a projection"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(HiddenLossConfig(**settings), STUDENT, TEACHER)


def test_settings_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    from kdtune import config

    schema = load_module(catalog.find_recipe("knowledge_distillation")).Config
    path = tmp_path / "some.yaml"
    path.write_text(
        "hidden_loss:\n  pairs:\n    - {student: 'model.layers.{0..3}', teacher: 'model.layers.{0..3}', loss: mse}\n"
    )
    required = ["checkpointer.checkpoint_dir=x", "dataset.source=x", "output_dir=x"]
    (pair,) = config.load(schema, path, required).hidden_loss.pairs
    assert pair == {"student": "model.layers.{0..3}", "teacher": "model.layers.{0..3}", "loss": "mse"}
    given = "hidden_loss.pairs=[{student: model.norm, teacher: 'model.layers.{0..0}'}]"
    assert config.load(schema, path, [*required, given]).hidden_loss.pairs == [
        {"student": "model.norm", "teacher": "model.layers.{0..0}"}
    ]
    for wrong in ("[model.norm]", "model.norm", "[{student: [1]}]"):
        with pytest.raises(ValueError, match=r"hidden_loss.pairs wants list\[dict\[str, str\]\]"):
            config.load(schema, path, [*required, f"hidden_loss.pairs={wrong}"])
