"""`hidden_loss.inputs=teacher`: blocks of layers that each learn by themselves, from what the teacher computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_runs import distil
from torch import Tensor
from ways import WAYS, plain

from kdtune import checkpoint, data
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.losses import HiddenLoss, HiddenLossConfig, Pair, pairs_of
from kdtune.models import Decoder
from kdtune.teacher import LiveTeacher

# Student's modules with the teacher's: blocks of one layer and of two, with the embedding before and the head behind.
PAIRS = [
    Pair("model.embed_tokens", "model.embed_tokens", "l1"),
    Pair("model.layers.0", "model.layers.1", "mse"),
    Pair("model.layers.2", "model.layers.3", "normalized_mse"),
]
BLOCKS = [range(0), range(1), range(1, 3)]  # layers of the student between a pair and the one before
STATES = [0, 2, 4]  # of the teacher, as transformers counts its hidden states
WEIGHT, KD_RATIO = 3.0, 0.75


@pytest.fixture(scope="module")
def pair(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Any]]:
    """A folder with a student of three layers and a teacher of five, and both in transformers, in float64."""
    folder = tmp_path_factory.mktemp("pair")
    student, teacher = (oracle("qwen3", num_hidden_layers=layers).double() for layers in (3, 5))
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for role, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(folder / role)
    # Its own is in float32, whatever comes in.
    norm = type(student.model.norm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon))
        yield folder, student, teacher.requires_grad_(False)


def micro_batches() -> list[data.Batch]:
    """Two, of which the second has a prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, prompt in ((9, 0), (12, 5)):
        tokens, labels = (torch.randint(97, (2, length), generator=generator) for _ in range(2))
        labels[:, :prompt] = data.IGNORE
        made.append(data.Batch(tokens, labels, torch.arange(length).expand(2, -1)))
    return made


DISTANCES = {
    "l1": lambda s, t: (s - t).abs().mean(-1),
    "mse": lambda s, t: (s - t).square().mean(-1),
    "normalized_mse": lambda s, t: (s - t).square().sum(-1) / t.square().sum(-1),
}


def by_definition(student: Any, teacher: Any, pairs: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
    """Each block of transformers' student by itself: the sum of all losses, and gradients by name."""
    student.zero_grad(set_to_none=True)
    batches = micro_batches()
    num_tokens, num_compared = data.count_labels(batches), sum(pair.distance is not None for pair in pairs)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        states = teacher.model(batch.tokens, output_hidden_states=True).hidden_states
        is_counted = batch.labels != data.IGNORE
        x = student.model.embed_tokens(batch.tokens)
        turn = student.model.rotary_emb(x, batch.positions)
        for one, layers, number in zip(pairs, BLOCKS, STATES, strict=True):
            for layer in layers:
                x = student.model.layers[layer](x, position_embeddings=turn, position_ids=batch.positions)
            if one.distance is not None:
                distance = DISTANCES[one.distance](x, states[number])[is_counted].sum() / num_tokens
                total = total + KD_RATIO * WEIGHT * distance / num_compared
            x = states[number]
        log_q = student.lm_head(student.model.norm(x)).log_softmax(-1)[is_counted]
        log_p = teacher.lm_head(states[-1]).log_softmax(-1)[is_counted]
        ce = F.nll_loss(log_q, batch.labels[is_counted], reduction="sum") / num_tokens
        kd = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / num_tokens
        total = total + (1 - KD_RATIO) * ce + KD_RATIO * kd
    total.backward()
    return total.detach(), {name: parameter.grad for name, parameter in student.named_parameters()}


def step(folder: Path, pairs: list[Pair], change: Callable[[Decoder], None] = plain) -> tuple[Tensor, dict[str, Any]]:
    """What the recipe logs of a step, and the gradients by name."""
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    student, teacher = (
        checkpoint.load_model(folder / role, dtype=torch.float64, device="cpu") for role in ("student", "teacher")
    )
    change(student)
    student.beside = HiddenLoss(pairs, inputs="teacher")
    cfg = recipe.Config(kd_ratio=KD_RATIO, hidden_loss=HiddenLossConfig(inputs="teacher", weight=WEIGHT))
    batches = micro_batches()
    logged = recipe.forward_backward(cfg, student, LiveTeacher(teacher), batches, data.count_labels(batches))
    return logged, {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("change", [plain, *WAYS])
def test_values_and_gradients(change: Callable[[Decoder], None], pair: tuple[Path, Any, Any]) -> None:
    folder, student, teacher = pair
    expected, expected_grads = by_definition(student, teacher, PAIRS)
    logged, grads = step(folder, PAIRS, change)
    torch.testing.assert_close(logged[0], expected, rtol=1e-10, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-8, atol=1e-12, msg=name)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_no_gradient_crosses_the_border_of_a_block(number: int, pair: tuple[Path, Any, Any]) -> None:
    """With one pair compared, nothing else but what follows the last pair learns; none of it has a gradient at all."""
    learns = [["embed_tokens"], ["layers.0"], ["layers.1", "layers.2"]][number]
    pairs = [one if i == number else one._replace(distance=None) for i, one in enumerate(PAIRS)]
    folder, student, teacher = pair
    _, expected = by_definition(student, teacher, pairs)
    _, grads = step(folder, pairs)
    for name, grad in grads.items():
        is_trained = any(f"model.{part}." in name for part in learns) or name in ("model.norm.weight", "lm_head.weight")
        assert (grad is not None) == is_trained, name
        if is_trained:
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four layers, a student of two, and a teacher of another width."""
    folder = tmp_path_factory.mktemp("tiny_pair")
    tiny_runs.write_model(folder / "student", seed=1)
    tiny_runs.write_model(folder / "teacher", seed=0, num_hidden_layers=4, initializer_range=0.1)
    tiny_runs.write_model(folder / "wide", seed=0, hidden_size=48)
    tiny_runs.write_rows(folder / "rows.jsonl")
    return folder


RANGES = "{student: 'model.layers.{0..1}', teacher: 'model.layers.{1..3..2}'}"
LAYERWISE = [
    f"hidden_loss.pairs=[{{student: model.embed_tokens, teacher: model.embed_tokens}},{RANGES}]",
    *("hidden_loss.inputs=teacher", "hidden_loss.name=normalized_mse"),
]
CONSTANT = ["lr_scheduler.name=constant", "lr_scheduler.num_warmup_steps=0", "gradient_accumulation_steps=1"]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["lora.rank=2"],
        ["dtype=bf16", "optimizer.precision=stochastic", "optimizer_in_bwd=true", "clip_grad_norm=null"],
        ["teacher.dtype=bf16", "dataset.packed=true", "enable_activation_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_it_learns_and_resumes(settings: list[str], tiny_pair: Path, tmp_path: Path) -> None:
    tiny_runs.learn_and_resume(tiny_pair, tmp_path, *LAYERWISE, *CONSTANT, *settings)


def test_as_model_optimizer_does(tiny_pair: Path, tmp_path: Path) -> None:
    """A layer that is trained behind one that is not: nothing else moves, also in a run that goes on."""
    pairs = [
        f"{{student: model.layers.{i}, teacher: model.layers.{i}, loss: {loss}}}"
        for i, loss in enumerate(("none", "mse"))
    ]
    settings = [f"hidden_loss.pairs=[{','.join(pairs)}]", "hidden_loss.inputs=teacher", *CONSTANT]
    settings += ["kd_ratio=1", "kd_loss.weight=0", "optimizer.weight_decay=0"]
    run = distil(tiny_pair, tmp_path, *settings, "max_steps=4", "save_every_n_steps=2")
    distil(tiny_pair, tmp_path, *settings, "max_steps=6", "resume_from_checkpoint=true")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_pair / "student", run / "model"))
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if "layers.1." in name}
    lines = tiny_runs.steps(run)
    assert lines[-1]["hidden_loss"] < lines[0]["hidden_loss"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["hidden_loss"], rel=1e-6)


NAMES = [
    "model.embed_tokens",
    *(f"model.layers.{i}{part}" for i in range(4) for part in (".mlp", "")),
    "model.norm",
]


def one(student: str, teacher: str, **more: str) -> dict[str, str]:
    return {"student": student, "teacher": teacher, **more}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": [one("model.layers.0.mlp", "model.layers.0.mlp")]}, "beside model.layers.0.mlp a residual stream"),
        (
            {"pairs": [one("model.layers.{0..1}", "model.layers.{0..1}"), one("model.norm", "model.layers.1")]},
            "lets model.norm learn to make model.layers.1 of model.layers.1",
        ),
        (
            {"pairs": [one("model.layers.2", "model.layers.1"), one("model.layers.1", "model.layers.3")]},
            "lets model.layers.2 learn to make model.layers.1 of model.layers.3",
        ),
        (
            {"pairs": [one("model.layers.1", "model.layers.0"), one("model.layers.1", "model.layers.3")]},
            "lets model.layers.1 learn to make model.layers.3 of model.layers.0, with which model.layers.1 is paired",
        ),
        ({"pairs": [one("model.norm", "model.norm")], "projection": "shared"}, "does not go with hidden_loss.inputs"),
        ({"pairs": [one("model.norm", "model.norm", loss="none")]}, "has loss: none everywhere"),
        (
            {"pairs": [one("model.norm", "model.norm"), one("model.layers.0", "model.layers.0", loss="none")]}
            | {"inputs": "student"},
            "which is for hidden_loss.inputs=teacher",
        ),
    ],
)
def test_pairs_that_make_no_blocks(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(HiddenLossConfig(**{"inputs": "teacher", **settings}), NAMES, NAMES)


def test_refusals(tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a weight is read."""
    kept = tiny_runs.cache(tiny_pair, tmp_path / "cache", "store.kind=hidden")
    for override, message in (
        (f"teacher_checkpointer.checkpoint_dir={tiny_pair / 'wide'}", "which take 32 numbers of a token, compute from"),
        (f"teacher.cache_dir={kept}", f"and of these teacher.cache_dir={kept} has none"),
    ):
        pairs = "hidden_loss.pairs=[{student: model.norm, teacher: model.norm}]"
        with pytest.raises(SystemExit):
            distil(tiny_pair, tmp_path / "run", pairs, "hidden_loss.inputs=teacher", override)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
