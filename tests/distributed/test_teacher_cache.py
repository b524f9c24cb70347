"""Processes that ask a teacher together, and students of several that learn from what it said, do as one does."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ranks
import tiny_runs
import torch
from safetensors import safe_open
from steps import Training, rows, save_pair
from tiny_runs import assert_same_answers, cache, distil_from_cache, validated_on

from kdtune import checkpoint, planning
from kdtune.cli.catalog import find_recipe
from kdtune.cli.recipe import load_module
from kdtune.config import load
from kdtune.distributed import ParallelConfig
from kdtune.losses import Convention
from kdtune.models import LoraConfig
from kdtune.teacher import CachedTeacher, LiveTeacher, ask
from kdtune.teacher_cache import Card, StoreConfig, Teacher, TeacherCache, Writer

HEADS = {"num_key_value_heads": 2}  # that two processes can split
KINDS = {
    "all": ["store.kind=top_k", "store.top_k=2051", "store.bits=32"],
    "top": ["store.kind=top_k", "store.top_k=50", "store.top_p=0.02", "store.bits=32"],
    "samples": ["store.kind=samples", "store.num_samples=9", "store.sampling_power=0.8", "store.bits=32"],
    "hidden": ["store.kind=hidden", "store.hidden_dtype=fp32"],
}
WAYS = {  # to ask, by number of processes: how they share the work, and what is kept
    2: (
        *("data_shard=2 top", "data_shard=2 hidden", "data_replicate=2 samples", "data_replicate=2 hidden"),
        *("pipeline=2 samples", "pipeline=2 hidden", *(f"tensor=2 {kind}" for kind in KINDS)),
    ),
    4: tuple(
        f"{layout} {kind}"
        for layout in ("data_shard=2 tensor=2", "data_replicate=2 data_shard=2", "pipeline=2 tensor=2")
        for kind in KINDS
    ),
}


# Asking.


def settings(way: str) -> list[str]:
    """Of `data_shard=2 tensor=2 top`: the layout, and what is kept."""
    *layout, kind = way.split()
    return [*(f"parallel.{degree}" for degree in layout), *KINDS[kind]]


def ask_together(size: int, folder: Path) -> dict[str, int]:
    """How many answers this process wrote, each way."""
    found, add = dict.fromkeys(WAYS[size], 0), Writer.add

    def note(writer: Writer, *args: Any) -> None:
        found[writer.folder.name] += 1
        add(writer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "add", note)
        for way in WAYS[size]:
            ranks.meet_at_another_port(folder / f"port of {way}")
            cache(folder, folder / way, *settings(way))
    return found


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, whose vocabulary two processes do not halve evenly; rows; and what one process was told of each kind."""
    folder = tmp_path_factory.mktemp("asked")
    tiny_runs.write_model(folder / "teacher", seed=0, **HEADS, vocab_size=2051, initializer_range=0.1)
    tiny_runs.write_model(folder / "student", seed=1, **HEADS)
    tiny_runs.write_rows(folder / "rows.jsonl")
    for kind in KINDS:
        cache(folder, folder / kind, *KINDS[kind])
    return folder


@pytest.fixture(scope="module")
def in_two(asked: Path, models: Path) -> list[dict[str, Any]]:
    """What two processes do, and found of it."""
    return ranks.run(2, work, asked, asked, models)


def work(folder: Path, models: Path) -> dict[str, Any]:
    planning.describe = lambda *_: "not planned"
    found = {"asked": ask_together(2, folder), "extended": extend(folder), "interrupted": interrupt(folder)}
    for name, (of_two, kind, of_both) in RUNS.items():
        ranks.meet_at_another_port(folder / f"port of {name}")
        distil_from_cache(folder, folder / name, folder / kind, *SAVING, *of_both, *of_two, *validated_on(folder))
    ranks.meet_at_another_port(folder / "port of steps")
    return found | {name: steps(models, name, 2) for name in STEPS}


@pytest.mark.parametrize("way", WAYS[2])
def test_answers_are_those_of_one_process(way: str, asked: Path, in_two: list[dict[str, Any]]) -> None:
    check_answers(asked, way, [found["asked"][way] for found in in_two])


@pytest.mark.slow
def test_answers_of_four_processes_are_those_of_one(asked: Path) -> None:
    found = ranks.run(4, ask_together, asked, 4, asked)
    for way in WAYS[4]:
        check_answers(asked, way, [one[way] for one in found])


def check_answers(asked: Path, way: str, written_by: list[int]) -> None:
    kind = way.split()[-1]
    # The ratio of a draw is kept in 16 bits, whose last one may be another.
    assert_same_answers(asked / kind, asked / way, 1e-3 if kind == "samples" else 1e-5)
    assert len(written(asked / way)) == sum(written_by) == 10
    if kind == "hidden":
        np.testing.assert_array_equal(*(TeacherCache(asked / one).head()[0] for one in (kind, way)))


def written(folder: Path) -> list[int]:
    """Examples of all shards."""
    shards = (safe_open(path, "np") for path in (folder / "shards").glob("[!.]*"))
    return [id for shard in shards for id in shard.get_tensor("ids").tolist()]


def extend(folder: Path) -> list[str]:
    """What is said of three rows, of all of them and of some that are among them, and of the same once more."""
    said = []
    for number, more in enumerate((["dataset.split=[:3]"], validated_on(folder), validated_on(folder))):
        ranks.meet_at_another_port(folder / f"port {number}")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cache(folder, folder / "extended", *KINDS["hidden"], *more)
        said.append(out.getvalue())
    return said


def test_rows_are_added(asked: Path, in_two: list[dict[str, Any]]) -> None:
    _, more, again = in_two[0]["extended"]
    assert "7 examples to ask about" in more
    assert "dataset_val: 3 rows" in more
    assert "Nothing is missing." in again
    assert len(written(asked / "extended")) == 10
    assert_same_answers(asked / "hidden", asked / "extended")


def interrupt(folder: Path) -> dict[str, int]:
    """Press Ctrl-C in the second process, with its first answer."""
    ranks.meet_at_another_port(folder / "port of the interrupted")
    added, add = [], Writer.add

    def note(writer: Writer, *args: Any) -> None:
        added.append(args[0])
        add(writer, *args)
        if os.environ["RANK"] == "1" and len(added) == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "add", note)
        with pytest.raises(SystemExit) as ended:
            cache(folder, folder / "interrupted", *KINDS["top"], "batch_size=1")
    return {"added": len(added), "status": int(ended.value.code or 0)}


def test_ctrl_c_to_one_ends_all(asked: Path, in_two: list[dict[str, Any]]) -> None:
    found = [one["interrupted"] for one in in_two]
    assert [one["status"] for one in found] == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    assert len(written(asked / "interrupted")) == sum(one["added"] for one in found) < 10
    cache(asked, asked / "interrupted", *KINDS["top"])
    assert sorted(written(asked / "interrupted")) == sorted(written(asked / "top"))
    assert_same_answers(asked / "top", asked / "interrupted")


def ask_slowly(folder: Path, output_dir: Path) -> None:
    """With a shard for each example, and time to be killed in."""
    add = Writer.add

    def add_slowly(writer: Writer, *args: Any) -> None:
        writer._shard_bytes = 1
        add(writer, *args)
        time.sleep(0.02)

    Writer.add = add_slowly  # type: ignore[method-assign]
    cache(folder, output_dir, *KINDS["top"])


def test_kills_lose_nothing_and_double_nothing(asked: Path) -> None:
    """`pytest -m slow tests/cli/test_launch.py` does it twenty times, with two processes."""
    folder, rng, kept = asked / "killed", random.Random(0), set[int]()
    for _ in range(2):
        process = ranks.start_alone(ask_slowly, asked, folder)
        wanted = len(kept) + rng.randint(1, 3)
        while len(list(folder.glob("shards/[!.]*"))) < wanted:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        now = TeacherCache(folder).ids.tolist()
        assert kept < set(now)
        assert len(now) < 10
        kept = set(now)
    cache(asked, folder, *KINDS["top"])
    assert sorted(written(folder)) == sorted(written(asked / "top"))
    assert_same_answers(asked / "top", folder)


# Learning.

LENGTHS = (5, 1, 24, 9)  # of the micro-batches of a step
PACKED = ((5, 8, 3), (1, 20))
STEPS: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "sharded": (ParallelConfig(), {}),
    "tensor": (ParallelConfig(tensor=2), {}),
    "context": (ParallelConfig(context=2), {}),
    "pipeline": (ParallelConfig(pipeline=2), {}),
    "lora": (ParallelConfig(), {"lora": LoraConfig(rank=2)}),
}
STORES = {"top_k": StoreConfig("top_k", top_k=7, bits=32), "samples": StoreConfig(kind="samples", num_samples=5)}
TAUGHT: list[tuple[str, Convention]] = [("samples", "bucket"), *(("top_k", one) for one in get_args(Convention))]


@pytest.fixture(scope="module")
def models(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair in float64, and what its teacher says of the rows of all steps."""
    folder = tmp_path_factory.mktemp("models")
    save_pair(oracle, folder, student=("qwen3-tied_biases", {}), teacher=("llama", {"vocab_size": 101}))
    teacher = LiveTeacher(checkpoint.load_model(folder / "teacher", dtype=torch.float64, device="cpu"))
    for kind, store in STORES.items():
        with Writer(folder / kind, Card(store, 101, Teacher("teacher", "its weights", "fp32"), "words")) as writer:
            for step, lengths in itertools.product(range(len(TAUGHT)), (LENGTHS, PACKED)):
                for batch in rows(step, lengths):
                    for example, answers in ask(teacher, batch, store):
                        writer.add(example, answers)
    return folder


def steps(models: Path, name: str, size: int) -> list[list[float]]:
    """Loss and gradient norm of a step by each of `TAUGHT`."""
    parallel, settings = STEPS[name]
    training = Training(models, parallel if size > 1 else ParallelConfig(), **settings)
    found = []
    for number, (kind, convention) in enumerate(TAUGHT):
        answers = TeacherCache(models / kind)
        training.teacher = CachedTeacher(answers, device=training.ranks.device, convention=convention)
        found.append(training.step(number, PACKED if name == "context" else LENGTHS))
    return found


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_one_process(name: str, models: Path, in_two: list[dict[str, Any]]) -> None:
    alone = steps(models, name, 1)
    for found in in_two:
        torch.testing.assert_close(found[name], alone, rtol=1e-9, atol=0)


SAVING = ["save_every_n_steps=4", "max_steps=4", "optimizer.eps=1e-3"]
TWO_AT_A_TIME = ["gradient_accumulation_steps=1"]
RUNS = {  # settings of two processes, the answers, and settings of one as well
    "sharded": (TWO_AT_A_TIME, "top", ["lora.rank=4"]),
    "pipeline": (["parallel.pipeline=2"], "hidden", ["kd_loss.temperature=2"]),
    "context": (["parallel.context=2"], "hidden", ["dataset.packed=true"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_of_one_process(name: str, asked: Path, in_two: list[dict[str, Any]], tmp_path: Path) -> None:
    """With answers that are read ahead, and a validation."""
    _, kind, of_both = RUNS[name]
    given = [*SAVING, *of_both, *validated_on(asked)]
    alone = distil_from_cache(asked, tmp_path / "alone", asked / kind, *given)
    assert_same_numbers(alone, asked / name)
    if name == "sharded":  # and goes on in one
        for run in (alone, asked / name):
            distil_from_cache(asked, run, asked / kind, *given, "max_steps=6", "resume_from_checkpoint=true")
        assert_same_numbers(alone, asked / name)


def assert_same_numbers(one: Path, other: Path) -> None:
    for line, expected in zip(tiny_runs.numbers(other), tiny_runs.numbers(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def settings_of_two(asked: Path, kind: str, *overrides: str) -> tuple[Any, Any]:
    """The recipe, and what it is given by the launcher of two processes."""
    recipe = load_module(find_recipe("knowledge_distillation"))
    given = [f"teacher.cache_dir={asked / kind}", f"checkpointer.checkpoint_dir={asked / 'student'}", "dtype=fp32"]
    given += ["device=cpu", "tokenizer.max_seq_len=64", "output_dir=unwritten", *overrides]
    return recipe, load(recipe.Config, None, given)


def test_hidden_states_do_not_go_with_tensor_parallel(asked: Path) -> None:
    recipe, cfg = settings_of_two(asked, "hidden", "parallel.tensor=2")
    with pytest.raises(ValueError, match=r"whose head is not cut into parts as parallel\.tensor=2 needs it"):
        recipe.check_settings(cfg, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [("top", "tensor"), ("hidden", "pipeline")])
def test_a_plan_of_two_processes(kind: str, layout: str, asked: Path) -> None:
    """Of a top k, also with the divergence that sorts whole rows."""
    more = ["kd_loss.name=adaptive_kl"] if kind == "top" else []
    recipe, cfg = settings_of_two(asked, kind, f"parallel.{layout}=2", *more)
    plan = planning.plan(cfg, recipe.build, recipe.forward_backward, recipe.check_settings, per_node=2)
    assert plan.device.parts.get("teacher weights", 0) == (4 * 2051 * 32 if kind == "hidden" else 0)  # the head
    assert plan.flops.get("teacher", 0) == 0
    assert plan.sent
