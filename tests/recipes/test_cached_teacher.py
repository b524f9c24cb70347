"""A teacher that was asked before: a run that learns from its answers is the run with the teacher itself."""

from __future__ import annotations

import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from tiny_runs import assert_same_answers, cache, distil_from_cache

from kdtune import planning
from kdtune.cli import catalog
from kdtune.cli.main import main
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.teacher import CachedTeacher
from kdtune.teacher_cache import HEAD, TOKENIZER, Samples, TeacherCache, TopK

ROOT = Path(__file__).resolve().parents[2]
ALL = ["store.kind=top_k", "store.top_k=2048", "store.bits=32"]  # of the vocabulary, exactly
KINDS = {
    "all": ALL,
    "hidden": ["store.kind=hidden", "store.hidden_dtype=fp32"],
    "samples": ["store.kind=samples", "store.num_samples=9", "store.sampling_power=0.8"],
    "top": ["store.kind=top_k", "store.top_k=50", "store.top_p=0.02"],
}


@pytest.fixture(autouse=True)
def raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes reach the test as they were raised."""
    monkeypatch.setenv("KDTUNE_TRACEBACK", "1")


@pytest.mark.parametrize("recipe", ["cache_teacher_logits", "cache_served_teacher"])
def test_tiny_caches_are_of_the_rows_that_tiny_runs_learn_from(recipe: str) -> None:
    cached, learned = (
        load(load_module(catalog.find_recipe(name)).Config, catalog.find_config("tiny", name), [])
        for name in (recipe, "knowledge_distillation")
    )
    for section in ("dataset", "dataset_val", "tokenizer"):
        assert getattr(cached, section) == getattr(learned, section)


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    expected, found = tiny_runs.numbers(one), tiny_runs.numbers(other)
    assert len(found) == len(expected)
    for line, other_line in zip(expected, found, strict=True):
        assert other_line == pytest.approx(line, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", ["all", "hidden"])
def test_a_run_equals_that_with_the_teacher(kind: str, tiny: Path, tmp_path: Path) -> None:
    settings = ["kd_ratio=1", *tiny_runs.validated_on(tiny)]
    live = tiny_runs.distil(tiny, tmp_path / "live", *settings)
    folder = cache(tiny, tmp_path / "cache", *KINDS[kind])
    assert_close(live, distil_from_cache(tiny, tmp_path / "cached", folder, *settings), 2e-6)


@pytest.mark.parametrize(
    "setting",
    [
        ["kd_loss.temperature=2", "kd_loss.label_margin=0.2", "kd_loss.initial_teacher_share=0.5"],
        ["kd_loss.name=adaptive_kl", "dataset.packed=true", "batch_size=1"],
    ],
)
def test_hidden_states_serve_every_objective(setting: list[str], tiny: Path, tmp_path: Path) -> None:
    live = tiny_runs.distil(tiny, tmp_path / "live", *setting)
    folder = cache(tiny, tmp_path / "cache", *KINDS["hidden"])
    assert_close(live, distil_from_cache(tiny, tmp_path / "cached", folder, *setting), 2e-6)


def test_the_divergence_of_few_tokens_is_less_and_grows_with_them(tiny: Path, tmp_path: Path) -> None:
    found = []
    for k in (1, 8, 64, 512, 2048):
        folder = cache(tiny, tmp_path / f"cache_{k}", "store.kind=top_k", f"store.top_k={k}", "store.bits=32")
        settings = ["max_steps=1", *tiny_runs.validated_on(tiny)]
        run = distil_from_cache(tiny, tmp_path / f"run_{k}", folder, *settings)
        found.append(tiny_runs.lines(run)[0]["val_kd_loss"])
    assert found == sorted(found)
    live = tiny_runs.distil(tiny, tmp_path / "live", "max_steps=1", *tiny_runs.validated_on(tiny))
    assert found[-1] == pytest.approx(tiny_runs.lines(live)[0]["val_kd_loss"], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_batches_and_packing(kind: str, tiny: Path, tmp_path: Path) -> None:
    one = cache(tiny, tmp_path / "one", *KINDS[kind])
    other = cache(tiny, tmp_path / "other", *KINDS[kind], "batch_size=2", "dataset.packed=true", "loss_chunk_size=5")
    assert_same_answers(one, other)


def test_other_seeds_draw_others(tiny: Path, tmp_path: Path) -> None:
    caches = [TeacherCache(cache(tiny, tmp_path / f"{i}", *KINDS["samples"], f"seed={i}")) for i in (0, 1)]
    one, other = (found.read(int(caches[0].ids[0])) for found in caches)
    assert isinstance(one, Samples)
    assert isinstance(other, Samples)
    assert one.ids.shape != other.ids.shape or (one.ids != other.ids).any()


def test_a_mass_keeps_as_few_tokens_as_reach_it(tiny: Path, tmp_path: Path) -> None:
    whole, part = (TeacherCache(cache(tiny, tmp_path / kind, *KINDS[kind])) for kind in ("all", "top"))
    for id in whole.ids.tolist():
        all_of_them, kept = whole.read(id), part.read(id)
        assert isinstance(all_of_them, TopK)
        assert isinstance(kept, TopK)
        probs = -np.sort(-np.exp(all_of_them.log_probs))
        needed = np.minimum(1 + (probs.cumsum(1) < 0.02).sum(1), 50)
        assert (kept.ids >= 0).sum(1).tolist() == needed.tolist()


# Stopping and going on.


def test_rows_are_added(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = cache(tiny, tmp_path / "whole")
    folder = cache(tiny, tmp_path / "parts", "dataset.split=[:4]")
    assert len(TeacherCache(folder)) == 4
    cache(tiny, folder, *tiny_runs.validated_on(tiny))
    assert "6 examples to ask about" in capsys.readouterr().out
    assert_same_answers(whole, folder)
    assert len(TeacherCache(folder).card.datasets) == 3
    shards = sorted((folder / "shards").iterdir())
    cache(tiny, folder)
    assert "Nothing is missing." in capsys.readouterr().out
    assert sorted((folder / "shards").iterdir()) == shards


def test_rows_that_both_data_sets_have_are_asked_about_once(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache(tiny, tmp_path / "cache", "dataset.split=[:2]", *tiny_runs.validated_on(tiny))
    asked = re.findall(r"(\d+) examples to ask about", capsys.readouterr().out)
    assert asked == ["2", "1"]


def test_a_head_is_made_anew(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cache(tiny, tmp_path / "cache", *KINDS["hidden"])
    head = (folder / HEAD).read_bytes()
    (folder / HEAD).unlink()
    with pytest.raises(ValueError, match="run cache_teacher_logits again: it writes the head anew"):
        TeacherCache(folder).head()
    cache(tiny, folder, *KINDS["hidden"])
    assert "Nothing is missing." not in capsys.readouterr().out
    assert (folder / HEAD).read_bytes() == head


def test_an_interrupted_run_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = cache(tiny, tmp_path / "whole")
    folder = tmp_path / "cache"
    with monkeypatch.context() as patched:
        recipe = "kdtune.teacher_cache.Writer.add"
        add, added = TeacherCacheAdd(), 0
        patched.setattr(recipe, add)
        with pytest.raises(SystemExit) as ended:
            cache(tiny, folder)
    assert ended.value.code == 128 + signal.SIGINT
    assert "SIGINT: the same command adds what is missing." in capsys.readouterr().out
    added = len(TeacherCache(folder))
    assert added == add.count
    assert added in (3, 6), "the batch that was being written, and the one that was asked about meanwhile"
    cache(tiny, folder)
    assert f"{10 - added} examples to ask about" in capsys.readouterr().out
    assert_same_answers(whole, folder)


class TeacherCacheAdd:
    """Writer.add, that presses Ctrl-C with the second example."""

    def __init__(self) -> None:
        from kdtune.teacher_cache import Writer

        self.count, self.add = 0, Writer.add

    def __get__(self, writer: Any, owner: type) -> Any:
        return lambda *args: self(writer, *args)

    def __call__(self, writer: Any, *args: Any) -> None:
        self.count += 1
        if self.count == 2:
            signal.raise_signal(signal.SIGINT)
        self.add(writer, *args)


# Reading.


def test_the_next_step_is_read_while_one_is_computed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache(tiny, tmp_path / "cache")
    readers = []
    read = TeacherCache.read

    def note(found: TeacherCache, id: int) -> Any:
        readers.append(threading.current_thread() is threading.main_thread())
        return read(found, id)

    monkeypatch.setattr(TeacherCache, "read", note)
    distil_from_cache(tiny, tmp_path / "run", folder)
    # 2 rows are looked at before the first step, which is then read as it comes.
    assert readers.count(True) == 2 + 4
    assert readers.count(False) >= 26


def test_a_stream_learns_from_answers(tiny: Path, tmp_path: Path) -> None:
    settings = ["dataset.streaming=true", "max_steps=4", "epochs=1"]
    live = tiny_runs.distil(tiny, tmp_path / "live", *settings)
    folder = cache(tiny, tmp_path / "cache", *ALL)
    assert_close(live, distil_from_cache(tiny, tmp_path / "cached", folder, *settings), 2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_reads_no_answers(kind: str, device: str, tiny: Path, tmp_path: Path) -> None:
    folder = cache(tiny, tmp_path / "cache", *KINDS[kind])
    recipe = load_module(ROOT / "recipes" / "knowledge_distillation.py")
    settings = [f"teacher.cache_dir={folder}", f"checkpointer.checkpoint_dir={tiny / 'student'}", "dtype=fp32"]
    cfg = load(recipe.Config, None, [*settings, f"device={device}", "tokenizer.max_seq_len=64", "output_dir=x"])
    plan = planning.plan(cfg, recipe.build, recipe.forward_backward, recipe.check_settings)
    assert plan.flops.get("teacher", 0) == 0
    assert plan.device.total > 0


# What is refused, before a weight is read.


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("kdtune.checkpoint.load_model", fail)
    monkeypatch.setattr("kdtune.checkpoint.load_start", fail)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "top",
            ["tokenizer.max_seq_len=40"],
            r"no answers for \d+ of the 10 examples of dataset\. An example is known",
        ),
        ("top", ["dataset.source={here}/other.jsonl"], r"no answers for 1 of the 11 examples of dataset"),
        ("top", ["dataset_val.source={here}/other.jsonl", "dataset_val.format=completion"], r"1 of .* of dataset_val"),
        ("top", ["teacher_checkpointer.checkpoint_dir={tiny}/student"], r"answers of another teacher \(teacher\) than"),
        ("top", ["teacher.quantization=int8"], r"teacher\.quantization=int8 says how a model is held"),
        ("top", ["teacher_parallel.data_shard=1"], r"teacher_parallel spreads a model over processes"),
        ("top", ["kd_loss.temperature=2"], r"kd_loss: temperature=2.*renormalised"),
        ("top", ["kd_loss.label_margin=0.1"], r"kd_loss: .*label_margin need"),
        ("samples", ["kd_loss.name=reverse_kl"], r"kd_loss: .*forward_kl"),
        ("samples", ["kd_loss.top_k_convention=partial"], r"top_k_convention=partial is about"),
    ],
)
def test_refusals(
    kind: str, settings: list[str], message: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache(tiny, tmp_path / "cache", *KINDS[kind])
    rows = (tiny / "rows.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(rows + '{"prompt": "Tom has", "completion": " none"}\n')
    monkeypatch.setattr("kdtune.checkpoint.load_start", lambda *_, **__: pytest.fail("a weight was read"))
    given = [setting.format(tiny=tiny, here=tmp_path) for setting in settings]
    with pytest.raises(ValueError, match=message):
        distil_from_cache(tiny, tmp_path / "run", folder, *given)


def test_a_folder_that_is_no_cache(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student is no teacher cache: it has no card\.json"):
        distil_from_cache(tiny, tmp_path / "run", tiny / "student")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher.cache_dir=x"], r"teacher\.cache_dir=x is for students; here a teacher is asked"),
        (["parallel.context=2"], r"parallel"),
        (["store.top_k=3"], r"store\.top_k=3 is about store\.kind=top_k"),
        (
            ["store.kind=top_k", "store.top_k=4096"],
            r"store\.top_k=4,096 asks for more tokens than the teacher's vocabulary has",
        ),
        (["dataset.streaming=true"], r"dataset\.streaming=true is for training"),
        (["teacher.offload=true"], r"teacher\.offload=true keeps"),
    ],
)
def test_refusals_of_the_recipe_that_asks(settings: list[str], message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cache(tiny, tmp_path / "cache", *settings)
    assert not (tmp_path / "cache").exists()


def test_other_answers_are_not_mixed_in(tiny: Path, tmp_path: Path) -> None:
    folder = cache(tiny, tmp_path / "cache", "store.kind=top_k", "store.top_k=8")
    with pytest.raises(ValueError, match=r"store\.top_k is 8 in the cache and 9 here"):
        cache(tiny, folder, "store.kind=top_k", "store.top_k=9")
    with pytest.raises(ValueError, match=r"teacher\.fingerprint is \w+ in the cache and \w+ here"):
        cache(
            tiny, folder, "store.kind=top_k", "store.top_k=8", f"teacher_checkpointer.checkpoint_dir={tiny / 'student'}"
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds other files: thesis\.tex"):
        cache(tiny, tmp_path / "full")


def test_a_live_teacher_needs_a_folder(tiny: Path, tmp_path: Path) -> None:
    argv = tiny_runs.arguments(tiny, tmp_path / "run", recipe="knowledge_distillation")
    with pytest.raises(ValueError, match=r"no value for teacher_checkpointer\.checkpoint_dir.*or teacher\.cache_dir="):
        main([x for x in argv if not x.startswith("teacher_checkpointer")])


def test_a_lost_tokenizer(tiny: Path, tmp_path: Path) -> None:
    folder = cache(tiny, tmp_path / "cache", *KINDS["top"])
    shutil.rmtree(folder / TOKENIZER)
    with pytest.raises(ValueError, match=r"has no tokenizer.*Copy the files .* into .*cache/tokenizer"):
        distil_from_cache(tiny, tmp_path / "run", folder)


def test_it_is_a_teacher_like_the_live_one(tiny: Path, tmp_path: Path) -> None:
    folder = cache(tiny, tmp_path / "cache", *KINDS["top"])
    teacher = CachedTeacher(TeacherCache(folder), device="cpu")  # type: ignore[arg-type]
    assert teacher.model is None
    teacher.compile()
    teacher.follow(object())
