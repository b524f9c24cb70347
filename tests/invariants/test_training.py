"""What a training step must not depend on, and what its loss is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import distil, finetune
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from kdtune import checkpoint, data, devices, losses, models, tokenizers
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.teacher import LiveTeacher

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def test_without_the_teacher_s_part_distillation_is_fine_tuning(tiny: Path, tmp_path: Path) -> None:
    distilled = distil(tiny, tmp_path / "distilled", "kd_ratio=0")
    finetuned = finetune(tiny, tmp_path / "finetuned")
    found = tiny_runs.steps(distilled)
    assert [line.pop("ce_loss") for line in found] == [line["loss"] for line in found]
    assert all(line.pop("kd_loss") > 0 for line in found)
    assert found == tiny_runs.steps(finetuned)  # loss, grad_norm, lr, num_tokens
    assert len(found) == 9
    tiny_runs.assert_same_weights(distilled / "model", finetuned / "model")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_teaches_itself_nothing(temperature: float, tiny: Path, tmp_path: Path) -> None:
    settings = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "kd_ratio=1", f"kd_loss.temperature={temperature}"]
    run = distil(
        tiny, tmp_path / "run", *settings, "epochs=1", "optimizer.weight_decay=0", "lr_scheduler.num_warmup_steps=1"
    )
    for line in tiny_runs.steps(run):
        assert abs(line["kd_loss"]) < 1e-6
        assert line["grad_norm"] < 1e-6


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that are told fp32 compute in float64."""
    monkeypatch.setitem(devices.DTYPES, "fp32", torch.float64)


# With such an eps AdamW's first update is lr * g / (|g| + eps): nearly the gradient, with no sign for rounding to turn.
ONE_SMOOTH_STEP = [
    "max_steps=1",
    "optimizer.lr=1",
    "optimizer.eps=1",
    "optimizer.weight_decay=0",
    "lr_scheduler.num_warmup_steps=0",
    "clip_grad_norm=null",
]


def assert_close_runs(one: Path, other: Path) -> None:
    for expected, found in zip(tiny_runs.steps(one), tiny_runs.steps(other), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)  # metrics are summed in float32
    expected_weights, found_weights = tiny_runs.weights(one / "model"), tiny_runs.weights(other / "model")
    assert all(weight.dtype == torch.float64 for weight in found_weights.values())
    for name, weight in expected_weights.items():
        torch.testing.assert_close(found_weights[name], weight, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("recipe", [distil, finetune])
def test_a_recipe_s_step_does_not_depend_on_its_micro_batches(recipe: Any, tiny: Path, tmp_path: Path) -> None:
    runs = [
        recipe(tiny, tmp_path / f"{rows}", *ONE_SMOOTH_STEP, f"batch_size={rows}", f"gradient_accumulation_steps={n}")
        for rows, n in SPLITS
    ]
    for run in runs[1:]:
        assert_close_runs(runs[0], run)


@pytest.mark.usefixtures("in_float64")
def test_the_size_of_loss_chunks_does_not_matter(tiny: Path, tmp_path: Path) -> None:
    runs = [
        distil(tiny, tmp_path / str(size), *ONE_SMOOTH_STEP, *tiny_runs.validated_on(tiny), f"loss_chunk_size={size}")
        for size in (1, 7, 4096)
    ]
    for run in runs[1:]:
        assert_close_runs(runs[0], run)
        for line, expected in zip(tiny_runs.numbers(run), tiny_runs.numbers(runs[0]), strict=True):
            assert line == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("recipe", [distil, finetune])
def test_activation_checkpointing_changes_nothing(recipe: Any, mode: str, tiny: Path, tmp_path: Path) -> None:
    settings = [f"checkpointer.checkpoint_dir={tiny / 'teacher'}", "kd_loss.temperature=2"][: 2 - (recipe is finetune)]
    plain = recipe(tiny, tmp_path / "plain", *settings)
    settings += ["enable_activation_checkpointing=true", f"activation_checkpointing_mode={mode}"]
    checkpointed = recipe(tiny, tmp_path / "checkpointed", *settings)
    tiny_runs.assert_same_run(plain, checkpointed)


# The same step, taken from the library, where every number is at hand in float64.


@pytest.fixture(scope="module")
def recipe() -> Any:
    return load_module(catalog.find_recipe("knowledge_distillation"))


@pytest.fixture
def examples(tiny: Path) -> data.Examples:
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    return data.load(cfg, tokenizers.load(tiny / "student"), 64)


def load_float64(folder: Path) -> models.Decoder:
    return checkpoint.load_model(folder, dtype=torch.float64, device="cpu")


def take_step(
    tiny: Path, recipe: Any, micro_batches: list[data.Batch], *overrides: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, ce, kd) and the gradients of one step of the recipe's objective."""
    argv = tiny_runs.arguments(tiny, tiny, *overrides, recipe="knowledge_distillation")
    cfg = load(recipe.Config, None, argv[2:])
    student, teacher = load_float64(tiny / "student"), LiveTeacher(load_float64(tiny / "teacher"))
    num_tokens = data.count_labels(micro_batches)
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in micro_batches:
        hidden = student.hidden(batch.tokens, batch.positions, batch.documents)
        loss = recipe.objective(cfg, hidden, student.head, teacher(batch), batch, num_tokens, progress=1.0)
        loss.total.backward()
        sums += torch.stack([loss.total.detach(), loss.ce, loss.kd])
    gradients = {}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return sums, gradients


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_does_not_depend_on_its_micro_batches(
    shuffle: bool, tiny: Path, recipe: Any, examples: data.Examples
) -> None:
    results = []
    for batch_size, accumulation in SPLITS:
        loader = data.Loader(
            examples, batch_size=batch_size, gradient_accumulation_steps=accumulation, shuffle=shuffle, seed=3
        )
        micro_batches = loader.next_step()
        assert len(micro_batches) == accumulation
        results.append(take_step(tiny, recipe, micro_batches, "kd_ratio=0.3", "kd_loss.temperature=2"))
    (expected_loss, expected), *others = results
    assert min(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for loss, gradients in others:
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10)


def test_a_row_s_loss_does_not_change_with_its_neighbours(tiny: Path, recipe: Any, examples: data.Examples) -> None:
    lengths = examples.lengths.tolist()
    assert len(set(lengths)) > 4, "otherwise nothing is padded"
    student, teacher = load_float64(tiny / "student"), LiveTeacher(load_float64(tiny / "teacher"))

    def loss_of_first_row(indices: list[int], pad_id: int) -> Tensor:
        batch = data.collate([examples[i] for i in indices], pad_id)
        targets = teacher(batch)
        hidden = student.hidden(batch.tokens, batch.positions, batch.documents)[:1]
        loss = losses.distillation_loss(
            hidden,
            student.head,
            batch.labels[:1],
            1,
            losses.Targets(targets.hidden[:1], targets.head),
            kd_weight=1.0,
            with_metrics=True,
        )
        return torch.stack([loss.total.detach(), loss.ce, loss.kd, loss.teacher_ce, loss.teacher_entropy])

    for i in range(len(examples)):
        alone = loss_of_first_row([i], pad_id=0)
        others = [j for j in range(len(examples)) if j != i]
        for neighbours, pad_id in ((others, 1), (others[::-1][:3], 77)):
            torch.testing.assert_close(loss_of_first_row([i, *neighbours], pad_id), alone, rtol=1e-12, atol=1e-12)


def test_what_is_scored(tiny: Path, tmp_path: Path) -> None:
    """The answer's first token after the prompt's last, then each after the one before, the end last; no more."""
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()][:4]
    settings = ["dataset.split=[:4]", "max_steps=1", "lr_scheduler.num_warmup_steps=0", "kd_ratio=0"]
    (line,) = tiny_runs.steps(distil(tiny, tmp_path / "run", *settings))

    tokenizer = HFTokenizer.from_file(str(tiny / "student" / "tokenizer.json"))
    model = load_float64(tiny / "student")
    begin, end = tokenizer.token_to_id("<|begin_of_text|>"), tokenizer.token_to_id("<|end_of_text|>")
    scores = []
    for row in rows:
        prompt, answer = (tokenizer.encode(row[key], add_special_tokens=False).ids for key in ("prompt", "completion"))
        ids = [*([begin] if tokenizer.encode("x").ids[0] == begin else []), *prompt, *answer, end]
        with torch.no_grad():
            log_q = model(torch.tensor([ids]))[0].log_softmax(-1)
        answer_starts = len(ids) - len(answer) - 1
        scores += [-log_q[position - 1, ids[position]].item() for position in range(answer_starts, len(ids))]
    assert line["num_tokens"] == len(scores)
    assert line["loss"] == pytest.approx(sum(scores) / len(scores), rel=1e-6)
