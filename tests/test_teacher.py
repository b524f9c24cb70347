"""The teacher: where it computes, in which numbers, and what it gives to the loss."""

from __future__ import annotations

import copy
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import save_file
from tiny_runs import distil
from torch import Tensor

from kdtune import checkpoint, data, losses, tokenizers
from kdtune.generation import generate
from kdtune.models import Decoder, dequantize, num_bytes, quantize, quantized_shapes, stream_layers
from kdtune.teacher import LiveTeacher

CPU = torch.device("cpu")
SHORT = ["epochs=1", "lr_scheduler.num_warmup_steps=1"]


def load(folder: Path, **settings: Any) -> Decoder:
    return checkpoint.load_model(folder, **{"dtype": torch.float32, "device": "cpu", **settings})


def batch_of(tiny: Path, packed: bool = False) -> data.Batch:
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    examples = data.load(cfg, tokenizers.load(tiny / "student"), 64)
    rows = [examples[i] for i in range(4)]
    return data.collate_packed([rows[:2], rows[2:]]) if packed else data.collate(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_may_be_kept_for_a_backward(packed: bool, tiny: Path) -> None:
    batch = batch_of(tiny, packed)
    teacher = LiveTeacher(load(tiny / "teacher"), student_device=CPU)
    targets = teacher(batch)
    assert torch.equal(targets.hidden, teacher.model.hidden(batch.tokens, batch.positions, batch.documents))
    assert not targets.hidden.requires_grad
    guess = torch.zeros_like(targets.hidden, requires_grad=True)
    (guess * targets.hidden).sum().backward()
    assert torch.equal(guess.grad, targets.hidden)


def test_a_dtype_of_its_own(tiny: Path, trained: Path, tmp_path: Path) -> None:
    """As if its folder held the rounded weights."""
    rounded = {name: weight.bfloat16() for name, weight in tiny_runs.weights(trained).items()}
    model = load(trained, dtype=torch.bfloat16)
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in rounded.items())
    teacher = [f"teacher_checkpointer.checkpoint_dir={trained}", *SHORT]
    plain, other = (
        tiny_runs.steps(distil(tiny, tmp_path / name, *teacher, *settings))
        for name, settings in (("plain", []), ("other", ["teacher.dtype=bf16"]))
    )
    assert [line["kd_loss"] for line in plain] != [line["kd_loss"] for line in other]
    assert [line["kd_loss"] for line in plain] == pytest.approx([line["kd_loss"] for line in other], rel=0.02)


def test_the_same_device_is_the_same_run(tiny: Path, tmp_path: Path) -> None:
    one = distil(tiny, tmp_path / "one", *SHORT)
    tiny_runs.assert_same_run(one, distil(tiny, tmp_path / "other", *SHORT, "teacher.device=cpu"))


def test_on_another_device_the_head_is_where_the_loss_is(tiny: Path) -> None:
    """With `meta` for the student's."""
    for tied in (True, False):
        tiny_runs.write_model(tiny / f"tied_{tied}", seed=0, tie_word_embeddings=tied)
        model = load(tiny / f"tied_{tied}")
        teacher = LiveTeacher(model, student_device=torch.device("meta"))
        targets = teacher(batch_of(tiny))
        assert targets.hidden.is_meta
        assert targets.head.weight.is_meta
        assert targets.head.weight.shape == model.head.weight.shape
        assert {parameter.device for parameter in model.parameters()} == {CPU}


def test_quantised_is_its_rounded_weights(tiny: Path, trained: Path, tmp_path: Path) -> None:
    """The run is that with a folder of what the few bits stand for."""
    rounded = tiny_runs.weights(trained)
    for name in quantized_shapes(load(trained).config):
        rounded[name] = dequantize(quantize(rounded[name], "int8"))
    folder = tmp_path / "rounded"
    checkpoint.save_model(load(trained), folder, config=checkpoint.read_config(trained))
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_bytes((trained / "tokenizer_config.json").read_bytes())
    quantised = [f"teacher_checkpointer.checkpoint_dir={trained}", "teacher.quantization=int8"]
    tiny_runs.assert_same_run(
        distil(tiny, tmp_path / "quantised", *SHORT, *quantised),
        distil(tiny, tmp_path / "plain", *SHORT, f"teacher_checkpointer.checkpoint_dir={folder}"),
    )


def test_quantised_is_compared_with_the_full_one_which_is_gone_by_then(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Decoder] = weakref.WeakSet()
    load_model = checkpoint.load_model
    is_compared = False  # and what the full teacher said is gone

    def watch(*args: Any, **settings: Any) -> Decoder:
        assert not alive, "never two teachers at a time"
        model = load_model(*args, **settings)
        if settings.get("quantization", "student") != "student":
            return model
        alive.add(model)
        return model

    monkeypatch.setattr(checkpoint, "load_model", watch)
    answers: list[weakref.ref[Tensor]] = []
    ask = LiveTeacher.__call__

    def remember(teacher: LiveTeacher, batch: data.Batch, *wanted: Any) -> losses.Targets:
        nonlocal is_compared
        is_compared = bool(answers) and answers[0]() is None
        targets = ask(teacher, batch, *wanted)
        answers.append(weakref.ref(targets.hidden))
        return targets

    monkeypatch.setattr(LiveTeacher, "__call__", remember)
    settings = [f"teacher_checkpointer.checkpoint_dir={trained}", "teacher.quantization=int8", "batch_size=4"]
    distil(tiny, tmp_path / "run", *SHORT, *settings, "teacher.compare_quantization=true")
    assert is_compared
    (line,) = re.findall(r"^teacher.quantization=int8 on 4 rows: (.*)$", capsys.readouterr().out, re.MULTILINE)

    monkeypatch.undo()
    batch, full, quantised = batch_of(tiny), load(trained), load(trained, quantization="int8")
    scored = batch.labels != data.IGNORE
    with torch.no_grad():
        log_p, log_q = (
            model(batch.tokens, batch.positions)[scored].double().log_softmax(-1) for model in (full, quantised)
        )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ce_p, ce_q = (-log.gather(1, batch.labels[scored][:, None]).mean() for log in (log_p, log_q))
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert line == (f"KL(full, quantised) {kl:.2g}, ce {ce_q:.3f} (full: {ce_p:.3f}), top-1 agreement {agreement:.1%}")
    assert kl > 0


# Layers in host memory.


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_streamed_layers_compute_the_same(quantization: Any, tiny: Path) -> None:
    folder = tiny_runs.write_model(
        tiny / "streamed", seed=0, initializer_range=0.1, intermediate_size=64, num_hidden_layers=3
    )
    model = load(folder, quantization=quantization).requires_grad_(False)
    batch, streamed = batch_of(tiny), copy.deepcopy(model)
    stream_layers(streamed, CPU)
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            assert torch.equal(streamed(batch.tokens), model(batch.tokens))
    prompts = [batch.tokens[0, :5].tolist()]
    assert generate(streamed, prompts, max_new_tokens=4) == generate(model, prompts, max_new_tokens=4)


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "nf4", "fp8", "int8_dynamic", "fp8_dynamic"])
def test_streamed_layers_come_one_ahead(quantization: Any, tmp_path: Path) -> None:
    """On `meta`, to which copies are made as to a GPU: two layers' worth at a time."""
    config = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    folder = tiny_runs.write_model(tmp_path / "wide", seed=0, head_dim=32, num_hidden_layers=3, **config)
    model = load(folder, quantization=quantization).requires_grad_(False)
    size = sum(num_bytes(parameter) for parameter in model.model.layers[0].parameters())
    stream_layers(model, torch.device("meta"))
    fetcher, held = model.model.layers[0].fetcher, []

    def count(weights: dict[str, Tensor]) -> int:
        assert all(weight.is_meta for weight in weights.values())
        return sum(num_bytes(weight) for weight in weights.values())

    get = fetcher.get

    def watch(index: int) -> dict[str, Tensor]:
        weights = get(index)
        held.append(count(weights) + sum(count(ahead) for ahead in fetcher._next.values()))
        return weights

    fetcher.get = watch
    with torch.inference_mode():
        out = model(torch.zeros(2, 20, dtype=torch.int64, device="meta"))
    assert out.shape == (2, 20, 2048)
    assert held == [2 * size, 2 * size, size]
    assert {parameter.device for parameter in model.model.layers.parameters()} == {CPU}


def test_what_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, words in (
        (["teacher.compare_quantization=true"], ["teacher.quantization is null"]),
        (["teacher.offload=true"], ["teacher.offload=true", "on the CPU they are there"]),
        (["teacher.quantization=nf4"], ["teacher.quantization=nf4", "multiple of 16384 weights", "Use int8"]),
        (["teacher.quantization=fp8_dynamic"], ["which CPUs do not", "Use fp8:"]),
        (["teacher.device=gpu"], ["teacher.device=gpu is not a device"]),
    ):
        with pytest.raises(SystemExit):
            distil(tiny, tmp_path / "run", *settings)
        err = capsys.readouterr().err
        assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()
