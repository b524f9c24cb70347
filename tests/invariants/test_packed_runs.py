"""A document is the same document, whatever shares its row: packing changes what is computed and not what is learnt."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import distil, finetune
from torch import Tensor

from kdtune import checkpoint, data, devices, losses, models, tokenizers
from kdtune.documents import Documents
from kdtune.models import attention
from kdtune.teacher import LiveTeacher

# What a model may have that looks at positions or at rows.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "sliding": {"model_type": "mistral", "sliding_window": 7},
    "sliding layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "dynamic rope": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
}
# Rounding of float64; but angles are float32, and those of dynamic rope, a power of each length, are rounded as the
# processor's vectors happen to cut the row.
EXACT, WITH_ANGLES = 1e-11, 1e-7
# Ten documents in rows, some shared by others, in orders of all kinds.
PACKINGS = [
    [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
    [[9, 3], [0], [8, 7, 6, 5], [1, 2, 4]],
    [[4, 0, 9], [2, 6, 1, 3], [5, 7, 8]],
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a student and a teacher of one architecture."""
    folder = tmp_path_factory.mktemp("pair")
    changes = ARCHITECTURES[request.param]
    return (
        tiny_runs.write_model(folder / "student", seed=1, initializer_range=0.1, **changes),
        tiny_runs.write_model(folder / "teacher", seed=2, initializer_range=0.2, hidden_size=48, **changes),
    )


@pytest.fixture
def tolerance(pair: tuple[Path, Path]) -> float:
    return WITH_ANGLES if "dynamic" in (pair[0] / "config.json").read_text() else EXACT


@pytest.fixture(scope="module")
def examples(tiny: Path) -> data.Examples:
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    found = data.load(cfg, tokenizers.load(tiny / "student"), 64)
    assert len(set(found.lengths)) > 4
    return found


def load_float64(folder: Path) -> models.Decoder:
    return checkpoint.load_model(folder, dtype=torch.float64, device="cpu")


def pack(examples: data.Examples, rows: list[list[int]], pad_id: int = 0) -> data.Batch:
    return data.collate_packed([[examples[i] for i in row] for row in rows], pad_id)


def alone(examples: data.Examples) -> list[data.Batch]:
    return [data.collate([examples[i]]) for i in range(len(examples))]


def sums_of(
    student: models.Decoder, teacher: LiveTeacher, batch: data.Batch, labels: Tensor, num_tokens: int
) -> losses.Loss:
    hidden = student.hidden(batch.tokens, batch.positions, batch.documents)
    return losses.distillation_loss(
        hidden, student.head, labels, num_tokens, teacher(batch), ce_weight=0.4, kd_weight=0.6, with_metrics=True
    )


def values(loss: losses.Loss) -> Tensor:
    return torch.stack([loss.total.detach(), loss.ce, loss.kd, loss.teacher_ce, loss.teacher_entropy])


def test_a_document_s_loss_is_the_one_it_has_alone(
    pair: tuple[Path, Path], examples: data.Examples, tolerance: float
) -> None:
    student, teacher = load_float64(pair[0]), LiveTeacher(load_float64(pair[1]))
    expected = [values(sums_of(student, teacher, batch, batch.labels, 1)) for batch in alone(examples)]
    assert len({round(float(value[2]), 6) for value in expected}) == len(examples), "no two documents are alike"
    for rows in PACKINGS:
        batch = pack(examples, rows, pad_id=77)
        for b, row in enumerate(rows):
            start = 0
            for i in row:
                place = slice(start, start := start + int(examples.lengths[i]))
                labels = torch.full_like(batch.labels, data.IGNORE)
                labels[b, place] = batch.labels[b, place]
                found = values(sums_of(student, teacher, batch, labels, 1))
                torch.testing.assert_close(found, expected[i], rtol=tolerance, atol=0)


def gradients(
    pair: tuple[Path, Path], batches: list[data.Batch], prepare: Callable[[models.Decoder], None] = lambda model: None
) -> tuple[Tensor, dict[str, Tensor]]:
    student, teacher = load_float64(pair[0]), LiveTeacher(load_float64(pair[1]))
    prepare(student)
    num_tokens = data.count_labels(batches)
    total = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        loss = sums_of(student, teacher, batch, batch.labels, num_tokens)
        loss.total.backward()
        total += values(loss)
    return total, {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def assert_same_step(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(found[1][name], gradient, rtol=100 * tolerance, atol=tolerance)


def test_a_step_does_not_depend_on_packing(pair: tuple[Path, Path], examples: data.Examples, tolerance: float) -> None:
    expected = gradients(pair, alone(examples))
    for rows in PACKINGS:
        assert_same_step(gradients(pair, [pack(examples, rows)]), expected, tolerance)
        assert_same_step(gradients(pair, [pack(examples, [row]) for row in rows]), expected, tolerance)


def test_packing_goes_with_activation_checkpointing(pair: tuple[Path, Path], examples: data.Examples) -> None:
    batches = [pack(examples, PACKINGS[1])]
    expected = gradients(pair, batches)
    found = gradients(pair, batches, models.enable_activation_checkpointing)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def kernel_of_any_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What torch 2.13 says of `varlen_attn`, in plain matrix products: heads [t, h, n], borders [documents + 1]."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query)
    assert cu_seq_q.diff().max() <= min(max_q, max_k)
    assert (query.size(1) != key.size(1)) == enable_gqa
    left, right = window_size
    assert right == 0
    outs = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (heads[start:end].transpose(0, 1) for heads in (query, key, value))
        k, v = (heads.repeat_interleave(len(q) // len(heads), dim=0) for heads in (k, v))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (distance > (left if left >= 0 else end))
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(hidden, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


def test_the_kernel_of_cuda_is_asked_for_the_same(
    pair: tuple[Path, Path], examples: data.Examples, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Borders, windows and groups of heads, as torch describes its kernel; tests/gpu asks the kernel itself."""
    expected = gradients(pair, alone(examples))
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda like, head_dim: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel_of_any_length)
    assert_same_step(gradients(pair, [pack(examples, PACKINGS[1])]), expected, tolerance)


def test_no_mask_of_a_row_is_made(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for each length and window at most, whatever the number of layers; none of [b, s, s]."""
    made: list[int] = []
    original = attention.attention_mask

    def counted(queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        made.append(keys.size(1))
        return original(queries, keys, *args, **kwargs)

    monkeypatch.setattr(attention, "attention_mask", counted)
    monkeypatch.setattr("kdtune.models.decoder.attention_mask", counted)
    documents = Documents.in_rows([[10] * 6] * 2)
    with torch.no_grad():
        load_float64(pair[0]).hidden(torch.zeros(2, 60, dtype=torch.int64), documents=documents)
    assert made in ([], [10])


def test_padding_is_a_document_of_its_own() -> None:
    found = Documents.in_rows([[2, 3], [6]])
    assert found.starts.tolist() == [0, 2, 5, 6, 12]
    assert found.starts.dtype == torch.int32
    assert found.lengths == [2, 3, 1, 6], "the end of a row is a border, too"
    assert found.longest == 6


# Through the recipes.

ALL_ROWS_IN_ONE_STEP = [
    "batch_size=10",
    "gradient_accumulation_steps=1",
    "max_steps=1",
    "optimizer.lr=1",
    "optimizer.eps=1",  # an update that is nearly the gradient, with no sign for rounding to turn
    "optimizer.weight_decay=0",
    "lr_scheduler.num_warmup_steps=0",
    "clip_grad_norm=null",
]


@pytest.mark.parametrize("recipe", [distil, finetune])
def test_a_recipe_s_step_does_not_depend_on_packing(
    recipe: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(devices.DTYPES, "fp32", torch.float64)
    settings = [*ALL_ROWS_IN_ONE_STEP, *tiny_runs.validated_on(tiny), "tokenizer.max_seq_len=128"]
    runs = [
        recipe(tiny, tmp_path / str(packed), *settings, f"dataset.packed={packed}", f"dataset_val.packed={packed}")
        for packed in (False, True)
    ]
    printed = capsys.readouterr().out
    assert "% padding" in printed
    assert "packed into 128 x 4 rows an epoch, 80.9% filled" in printed
    for line, expected in zip(*(tiny_runs.numbers(run) for run in runs[::-1]), strict=True):
        assert line == pytest.approx(expected, rel=1e-6)  # metrics are summed in float32
    expected_weights, found_weights = (tiny_runs.weights(run / "model") for run in runs)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(found_weights[name], weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", [["dataset.packed=true"], ["dataset.group_by_length=true", "batch_size=1"]])
def test_a_run_that_was_stopped_is_the_run_that_never_stopped(
    how: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny_runs.validated_on(tiny), "dataset_val.packed=true", "tokenizer.max_seq_len=96", *how]
    whole = distil(tiny, tmp_path / "whole", *settings)
    resumed = tmp_path / "resumed"
    next_step, count = data.Loader.next_step, 0

    def stop_in_the_fourth(loader: data.Loader) -> list[data.Batch]:
        nonlocal count
        count += 1
        if count == 4:
            signal.raise_signal(signal.SIGTERM)
        return next_step(loader)

    monkeypatch.setattr(data.Loader, "next_step", stop_in_the_fourth)
    with pytest.raises(SystemExit):
        distil(tiny, resumed, *settings)
    distil(tiny, resumed, *settings, "resume_from_checkpoint=true")
    assert len(tiny_runs.steps(whole)) > 4
    tiny_runs.assert_same_run(whole, resumed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dataset.packed=true", "dataset.group_by_length=true"], "dataset.group_by_length=true is for rows of one"),
        (["shuffle=false", "dataset.group_by_length=true"], "dataset.group_by_length=true puts rows of similar length"),
        (["dataset_val.packed=true", "dataset_val.group_by_length=true"], "dataset_val.group_by_length=true is for"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    settings: list[str], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        distil(tiny, tmp_path, *tiny_runs.validated_on(tiny), *settings)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
