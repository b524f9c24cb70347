"""What only `knowledge_distillation` does: a teacher that is proved, a blend of two losses, pairs that do not fit."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_runs
import torch
from safetensors.torch import save_file
from tiny_runs import distil

from kdtune import checkpoint, data, losses, tokenizers

SHORT = ["epochs=1", "lr_scheduler.num_warmup_steps=1"]


def taught_by(teacher: Path) -> str:
    return f"teacher_checkpointer.checkpoint_dir={teacher}"


def test_the_loss_is_the_blend(tiny: Path, tmp_path: Path) -> None:
    for ratio in (0.0, 0.3, 1.0):
        for line in tiny_runs.steps(distil(tiny, tmp_path / str(ratio), *SHORT, f"kd_ratio={ratio}")):
            blend = (1 - ratio) * line["ce_loss"] + ratio * line["kd_loss"]
            assert line["loss"] == pytest.approx(blend, rel=1e-6)


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, None), (3.0, None), (3.0, 0.7)])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_divergence_is_what_its_definition_says(
    temperature: float, teacher_temperature: float | None, scaled: bool, tiny: Path, tmp_path: Path
) -> None:
    """Against dense logits of both folders, computed apart from the recipe."""
    settings = [f"kd_loss.temperature={temperature}", f"kd_loss.scale_by_temperature_squared={str(scaled).lower()}"]
    if teacher_temperature is not None:
        settings.append(f"kd_loss.teacher_temperature={teacher_temperature}")
    run = distil(tiny, tmp_path / "run", *settings, "max_steps=1", "lr_scheduler.num_warmup_steps=0", "batch_size=10")
    (line,) = tiny_runs.steps(run)

    student, teacher = (
        checkpoint.load_model(tiny / name, dtype=torch.float64, device="cpu") for name in ("student", "teacher")
    )
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    examples = data.load(cfg, tokenizers.load(tiny / "student"), 64)
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(examples)):
            tokens, labels = examples[i]
            log_q = (student(tokens[None])[0] / temperature).log_softmax(-1)
            log_p = (teacher(tokens[None])[0] / (teacher_temperature or temperature)).log_softmax(-1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[labels != data.IGNORE]
            total, count = total + divergence.sum().item(), count + len(divergence)
    expected = total / count * (temperature**2 if scaled else 1)
    assert line["num_tokens"] == count
    assert line["kd_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [None, 0.0, math.nan], ids=["random", "zero", "nan"])
def test_an_untrained_teacher_is_called_out(
    weight: float | None, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_runs.write_model(tmp_path / "teacher", seed=3)  # with this seed a little better than the guess
    if weight is not None:
        weights = {
            name: value if "norm" in name else torch.full_like(value, weight)
            for name, value in tiny_runs.weights(teacher).items()
        }
        save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with contextlib.suppress(SystemExit):  # a loss of NaN ends the run
        distil(tiny, tmp_path / "run", *SHORT, taught_by(teacher), "batch_size=10", "kd_ratio=1")
    out = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in out if line.startswith("WARNING: "))
    assert "no better than a uniform guess" in warning
    assert str(teacher) in warning
    (shown,) = (line for line in out if line.startswith("teacher check"))
    assert f"a uniform guess: {math.log(2048):.3f}" in shown
    assert "KL(teacher, student)" in shown


def test_a_trained_teacher_is_not(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distil(tiny, tmp_path / "run", taught_by(trained), *SHORT, "batch_size=16")
    out = capsys.readouterr().out
    assert "WARNING" not in out
    assert "teacher check on 10 rows: " in out, "there are no more"


def test_closing_table(tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = distil(tiny, tmp_path / "run", taught_by(trained), *SHORT, *tiny_runs.validated_on(tiny))
    before, after = (line for line in tiny_runs.lines(run) if "val_ce_loss" in line)
    out = capsys.readouterr().out.splitlines()
    (head,) = (index for index, line in enumerate(out) if line.split()[:2] == ["validation", "ce"])
    rows = [(" ".join(line.split()[:-3]), line.split()[-3:]) for line in out[head + 1 : head + 4]]
    assert rows == [
        (
            name,
            [f"{line['val_ce_loss']:.3f}", f"{line['val_kd_loss']:.3f}", f"{line['val_agreement']:.1%}"],
        )
        for name, line in (
            ("student before", before),
            ("student after", after),
            ("teacher", {"val_ce_loss": after["val_teacher_ce_loss"], "val_kd_loss": 0.0, "val_agreement": 1.0}),
        )
    ]
    assert after["val_teacher_ce_loss"] == before["val_teacher_ce_loss"] < 4


def test_a_student_that_is_its_teacher_agrees_with_it(tiny: Path, trained: Path, tmp_path: Path) -> None:
    same = [taught_by(trained), f"checkpointer.checkpoint_dir={trained}"]
    run = distil(tiny, tmp_path / "run", *same, *SHORT, *tiny_runs.validated_on(tiny))
    before = tiny_runs.lines(run)[0]
    assert before["val_agreement"] == 1
    assert before["val_kd_loss"] == pytest.approx(0, abs=1e-6)
    assert before["val_ce_loss"] == before["val_teacher_ce_loss"]


def test_the_teacher_is_not_trained(tiny: Path, trained: Path, tmp_path: Path) -> None:
    before = tiny_runs.weights(trained)
    run = distil(tiny, tmp_path / "run", taught_by(trained), *tiny_runs.validated_on(tiny), "run_val_every_n_steps=3")
    values = {line["val_teacher_ce_loss"] for line in tiny_runs.lines(run) if "val_teacher_ce_loss" in line}
    assert len(values) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_runs.weights(trained).items())


# Pairs.


@pytest.fixture
def pair(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """`pair(vocab_size=2050)`: a teacher like the student, with a config and a tokenizer of its own."""

    def make(vocab_size: int = 2048, swapped: tuple[str, str] | None = None, added: str | None = None) -> Path:
        folder = tiny_runs.write_model(tmp_path / "other", seed=2, vocab_size=vocab_size)
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocab = tokenizer["model"]["vocab"]
        if swapped:
            one, other = swapped
            vocab[one], vocab[other] = vocab[other], vocab[one]
        if added:
            vocab[added] = len(vocab)
        path.write_text(json.dumps(tokenizer))
        return folder

    return make


@pytest.mark.parametrize("teacher_is_larger", [True, False])
def test_vocabularies_may_differ_by_padding(
    teacher_is_larger: bool, tiny: Path, tmp_path: Path, pair: Callable[..., Path]
) -> None:
    padded = pair(vocab_size=2112)
    settings = [taught_by(padded)]
    if not teacher_is_larger:
        settings = [taught_by(tiny / "teacher"), f"checkpointer.checkpoint_dir={padded}"]
    run = distil(tiny, tmp_path / "run", *settings, *SHORT, *tiny_runs.validated_on(tiny))
    assert all(line["kd_loss"] > 0 for line in tiny_runs.steps(run))


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ({"swapped": ("a", "b")}, "do not share a tokenizer: id "),
        ({"vocab_size": 2000}, "2048 ids, the teacher's embedding 2000 rows"),
        ({"vocab_size": 2049, "added": "zzz", "swapped": ("c", "d")}, "Student (vocabulary 2048) and teacher (2049)"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(
    differs: dict[str, object],
    message: str,
    tiny: Path,
    tmp_path: Path,
    pair: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = pair(**differs)
    monkeypatch.setattr("kdtune.checkpoint.source.read_into", None)
    with pytest.raises(SystemExit) as end:
        distil(tiny, tmp_path / "run", taught_by(teacher))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_teacher_with_a_missing_shard_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny / "teacher", folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(SystemExit):
        distil(tiny, tmp_path / "run", taught_by(folder))
    assert "not a complete safetensors file" in capsys.readouterr().err


def test_a_short_teacher_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_runs.write_model(tmp_path / "short", seed=0, max_position_embeddings=63)
    with pytest.raises(SystemExit):
        distil(tiny, tmp_path / "run", taught_by(folder))
    assert "max_seq_len is 64, and the teacher was built for 63" in capsys.readouterr().err


@pytest.mark.parametrize("name", get_args(losses.DivergenceName))
def test_every_divergence_trains(name: str, tiny: Path, tmp_path: Path) -> None:
    run = distil(
        tiny, tmp_path / "run", f"kd_loss.name={name}", "kd_ratio=1", "epochs=20", *tiny_runs.validated_on(tiny)
    )
    found = tiny_runs.steps(run)
    assert found[-1]["kd_loss"] < 0.9 * found[0]["kd_loss"]
    before, after = (line for line in tiny_runs.lines(run) if "val_kd_loss" in line)
    assert after["val_kd_loss"] < before["val_kd_loss"], "the forward KL, whatever is trained on"


def test_a_parameter_of_another_divergence_is_refused(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        distil(tiny, tmp_path / "run", "kd_loss.name=reverse_kl", "kd_loss.beta=0.3")
    assert "kd_loss.beta=0.3 does not apply to reverse_kl; it belongs to symmetric_kl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_parameters_reach_the_divergence(tiny: Path, tmp_path: Path) -> None:
    def kd(*settings: str) -> float:
        run = distil(tiny, tmp_path / "-".join(settings), *settings, "max_steps=1", "lr_scheduler.num_warmup_steps=0")
        return tiny_runs.steps(run)[0]["kd_loss"]

    forward, reverse = kd("kd_loss.name=forward_kl"), kd("kd_loss.name=reverse_kl")
    assert kd("kd_loss.name=symmetric_kl", "kd_loss.beta=0.3") == pytest.approx(0.3 * forward + 0.7 * reverse, rel=1e-5)
    assert kd("kd_loss.name=skew_forward_kl", "kd_loss.alpha=0.001") == pytest.approx(forward, rel=0.02)
    assert kd("kd_loss.name=jsd", "kd_loss.beta=0.001") == pytest.approx(0.001 * forward, rel=0.02)


def test_weights_of_the_blend_are_of_the_total_alone(tiny: Path, tmp_path: Path) -> None:
    def first(name: str, *settings: str) -> dict[str, float]:
        one_step = ["kd_ratio=0.25", "max_steps=1", "lr_scheduler.num_warmup_steps=0"]
        return tiny_runs.steps(distil(tiny, tmp_path / name, *settings, *one_step))[0]

    plain, weighted = first("plain"), first("weighted", "kd_loss.weight=3", "ce_loss.weight=0.5")
    assert (plain["ce_loss"], plain["kd_loss"]) == (weighted["ce_loss"], weighted["kd_loss"])
    assert weighted["loss"] == pytest.approx(0.75 * 0.5 * plain["ce_loss"] + 0.25 * 3 * plain["kd_loss"], rel=1e-5)


def test_settings_of_a_top_k_are_refused_where_all_is_known(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        distil(tiny, tmp_path / "run", "kd_loss.top_k_convention=partial")
    assert "kd_loss.top_k_convention=partial is about a teacher of which only the top k" in capsys.readouterr().err


def test_the_balance_is_logged_beside_what_it_balances(tiny: Path, tmp_path: Path) -> None:
    for line in tiny_runs.steps(distil(tiny, tmp_path / "run", *SHORT, "kd_loss.balance=true", "kd_ratio=0.3")):
        assert line["kd_factor"] == pytest.approx(line["ce_loss"] / line["kd_loss"], rel=1e-5)
        assert line["loss"] == pytest.approx(line["ce_loss"], rel=1e-5)
    assert "kd_factor" not in tiny_runs.steps(distil(tiny, tmp_path / "plain", *SHORT))[0]


def test_the_teacher_s_share_of_the_target_rises_to_one(tiny: Path, tmp_path: Path) -> None:
    """With the student in the target there is less to learn at first; at the last step it is the teacher alone."""
    settings = ["kd_ratio=1", "optimizer.lr=1e-12", "shuffle=false", "epochs=3", "batch_size=10"]
    shares = tiny_runs.steps(distil(tiny, tmp_path / "share", *settings, "kd_loss.initial_teacher_share=0.1"))
    plain = tiny_runs.steps(distil(tiny, tmp_path / "plain", *settings))
    ratios = [line["kd_loss"] / other["kd_loss"] for line, other in zip(shares, plain, strict=True)]
    # The target's logits are share * teacher + (1 - share) * student: the divergence is about share^2 of the whole.
    assert ratios == pytest.approx([0.4**2, 0.7**2, 1.0], rel=0.1)


def test_smoothing_and_z_loss_are_trained_on_and_not_logged_as_cross_entropy(tiny: Path, tmp_path: Path) -> None:
    settings = ["max_steps=1", "lr_scheduler.num_warmup_steps=0", "kd_ratio=0"]
    changed, plain = (
        tiny_runs.steps(distil(tiny, tmp_path / name, *settings, *more))[0]
        for name, more in (("changed", ["ce_loss.label_smoothing=0.1", "ce_loss.z_loss=0.01"]), ("plain", []))
    )
    assert changed["ce_loss"] == plain["ce_loss"] == plain["loss"]
    assert changed["loss"] > plain["loss"]


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps(tiny: Path, tmp_path: Path) -> None:
    compiled, eager = (
        tiny_runs.steps(distil(tiny, tmp_path / str(flag), *SHORT, f"compile={flag}", "batch_size=10"))
        for flag in ("true", "false")
    )
    for line, other in zip(compiled, eager, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_compiling_without_a_compiler_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit):
        distil(tiny, tmp_path / "run", "compile=true")
    assert "there is no no-such-compiler to compile it" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["kd_ratio=1.5", "kd_ratio=-0.1", "kd_loss.temperature=0"])
def test_settings_out_of_range(setting: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distil(tiny, tmp_path / "run", setting)
    assert setting.partition("=")[0] in capsys.readouterr().err


def test_tokens_that_only_the_student_has(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A larger student may know more tokens; where a row has one, the teacher has nothing to say."""
    student = tiny_runs.write_model(tmp_path / "student", seed=1, vocab_size=2056)
    content = json.loads((student / "tokenizer.json").read_text())
    new = {**content["added_tokens"][-1], "id": 2048, "content": "<|new|>"}
    (student / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], new]}))
    settings = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|new|>"}))
    larger = [f"checkpointer.checkpoint_dir={student}", *SHORT]
    distil(tiny, tmp_path / "run", *larger)  # and its padding token is none of the teacher's

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b <|new|> c"}\n')
    with pytest.raises(SystemExit):
        distil(tiny, tmp_path / "refused", *larger, f"dataset.source={tmp_path / 'rows.jsonl'}")
    assert "line 1 of" in (message := capsys.readouterr().err)
    assert "has the token '<|new|>' with id 2048" in message


def test_the_tokenizer_of_an_earlier_run_there_is_not_deleted(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distil(tiny, tmp_path / "run", *SHORT)
    with pytest.raises(SystemExit):
        distil(tiny, run, *SHORT, "overwrite_output_dir=true", f"tokenizer.path={run / 'model/tokenizer.json'}")
    assert "is part of the run in output_dir" in capsys.readouterr().err
    assert (run / "model/tokenizer.json").is_file()
