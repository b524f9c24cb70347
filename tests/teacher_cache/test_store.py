"""The folder: what is written is read, by whomever and in whatever order, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import made_answers
import numpy as np
import pytest
from safetensors.numpy import load_file

from kdtune.teacher_cache import (
    Answers,
    Card,
    Dataset,
    Hidden,
    StoreConfig,
    Teacher,
    TeacherCache,
    TopK,
    Writer,
    open_to_extend,
    store,
    write_head,
    write_tokenizer,
)

VOCAB_SIZE = 97
CARD = Card(StoreConfig("top_k", top_k=5), VOCAB_SIZE, Teacher("tiny", "0123", "fp32"), "4567")
HIDDEN_CARD = replace(CARD, store=StoreConfig(kind="hidden"), hidden={"size": 4})
FIRST_ID = 2**64 - 40  # ids are of 64 bits, without sign


def make_answers(example_id: int) -> TopK:
    return made_answers.top_k(example_id % 1000, 1 + example_id % 9, 5, VOCAB_SIZE)


def write(folder: Path, ids: Iterable[int], shard_bytes: int = 300, card: Card = CARD) -> Writer:
    with Writer(folder, card, shard_bytes) as writer:
        for example_id in ids:
            writer.add(example_id, make_answers(example_id))
    return writer


def check(folder: Path, ids: Iterable[int]) -> TeacherCache:
    """The cache has these examples, each with its answers."""
    cache = TeacherCache(folder)
    ids = sorted(ids)
    assert cache.ids.tolist() == ids
    for example_id in ids:
        same_as_written(cache.read(example_id), example_id)
    return cache


def same_as_written(found: Answers, example_id: int) -> None:
    answers = make_answers(example_id)
    assert isinstance(found, TopK)
    assert len(found) == len(answers)
    assert (np.sort(found.ids, 1) == np.sort(answers.ids, 1)).all()
    np.testing.assert_allclose(found.entropy, answers.entropy, atol=0.1)


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())


def num_rows(folder: Path) -> int:
    """Of all shards, doubled ones twice."""
    return sum(len(load_file(path)["ids"]) for path in shards(folder) if path.suffix == ".safetensors")


# What is written is read.


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ids = range(FIRST_ID, FIRST_ID + 30)
    writer = write(tmp_path, ids)
    assert len(shards(tmp_path)) > 3
    cache = check(tmp_path, ids)
    num_tokens = sum(len(make_answers(i)) for i in ids)
    assert (writer.num_examples, writer.num_tokens) == (30, num_tokens) == (len(cache), cache.num_tokens)
    assert cache.num_bytes == sum(path.stat().st_size for path in shards(tmp_path)) > writer.num_bytes
    assert FIRST_ID in cache
    assert 7 not in cache
    with pytest.raises(KeyError, match="no example 0000000000000007"):
        cache.read(7)
    assert cache.summary() == (
        f"top 5 in 8 bits of tiny: 30 examples, {num_tokens} labelled tokens, {cache.num_bytes / 2**20:.1f} MiB "
        f"({cache.num_bytes / num_tokens:.1f} bytes a token)"
    )


def test_an_empty_cache_has_nothing(tmp_path: Path) -> None:
    write(tmp_path, [])
    cache = check(tmp_path, [])
    assert cache.missing(np.array([5, 3], np.uint64)).tolist() == [0, 1]


def test_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, [FIRST_ID, 5])
    ids = np.array([8, FIRST_ID, 3, 8, 5, 3, FIRST_ID + 1], np.uint64)
    assert TeacherCache(tmp_path).missing(ids).tolist() == [0, 2, 6]


def test_order_and_cuts_make_no_difference(tmp_path: Path) -> None:
    ids = list(range(25))
    found = []
    for trial, shard_bytes in enumerate((1, 200, 1000, 2**20)):
        random.Random(trial).shuffle(ids)
        write(tmp_path / str(trial), ids, shard_bytes)
        found.append(check(tmp_path / str(trial), ids))
    for example_id in ids:
        first, *others = (cache.read(example_id) for cache in found)
        for other in others:
            for field in fields(first):
                assert (getattr(first, field.name) == getattr(other, field.name)).all()


def test_a_cache_is_extended(tmp_path: Path) -> None:
    sets = [Dataset({"source": name}, 384, 10) for name in ("first.jsonl", "second.jsonl")]
    write(tmp_path, range(10), card=replace(CARD, datasets=(sets[0],)))
    write(tmp_path, range(5, 20), card=replace(CARD, datasets=(sets[1],)))
    write(tmp_path, [], card=replace(CARD, datasets=(sets[0],)))
    assert check(tmp_path, range(20)).card.datasets == tuple(sets)


def test_what_is_there_before_more_is_added(tmp_path: Path) -> None:
    assert open_to_extend(tmp_path / "nowhere", CARD) is None
    assert open_to_extend(tmp_path, CARD) is None
    write(tmp_path, range(3))
    there = open_to_extend(tmp_path, CARD)
    assert there is not None
    assert there.ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="vocab_size is 97 in the cache and 98 here"):
        open_to_extend(tmp_path, replace(CARD, vocab_size=98))
    (tmp_path / "card.json").unlink()
    with pytest.raises(ValueError, match="shards without a card"):
        open_to_extend(tmp_path, CARD)


def test_a_tokenizer_lies_beside_the_answers(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    write_tokenizer(tmp_path, {"tokenizer.json": b"{}", "chat_template.jinja": b"x"})
    write_tokenizer(tmp_path, {"tokenizer.json": b"{}"})
    found = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    assert found == {"tokenizer.json": b"{}", "chat_template.jinja": b"x"}
    check(tmp_path, range(3))


def test_an_example_counts_once(tmp_path: Path) -> None:
    writer = write(tmp_path, [1, 2, 1])
    assert writer.num_examples == 2
    assert num_rows(tmp_path) == 2
    write(tmp_path, [3, 2, 4])
    cache = check(tmp_path, [1, 2, 3, 4])
    assert cache.num_tokens == sum(len(make_answers(i)) for i in (1, 2, 3, 4))


def test_a_shard_is_closed_after_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow teacher's answers are not lost, either."""
    with Writer(tmp_path, CARD) as writer:
        writer.add(1, make_answers(1))
        assert not shards(tmp_path)
        monkeypatch.setattr(store, "_SHARD_SECONDS", -1.0)
        writer.add(2, make_answers(2))
        assert len(shards(tmp_path)) == 1
        monkeypatch.undo()
        writer.add(3, make_answers(3))
    assert len(shards(tmp_path)) == 2
    check(tmp_path, [1, 2, 3])


def test_what_was_answered_before_an_error_is_kept(tmp_path: Path) -> None:
    def answer_until_broken() -> None:
        with Writer(tmp_path, CARD) as writer:
            writer.add(1, make_answers(1))
            writer.add(2, replace(make_answers(2), entropy=np.full(3, np.nan)))

    with pytest.raises(ValueError, match="NaN"):
        answer_until_broken()
    check(tmp_path, [1])


def test_many_threads_write(tmp_path: Path) -> None:
    ids = [*range(100), *range(50)]
    with Writer(tmp_path, CARD, shard_bytes=500) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda example_id: writer.add(example_id, make_answers(example_id)), ids))
    assert writer.num_examples == num_rows(tmp_path) == 100
    check(tmp_path, range(100))


def test_many_threads_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_NUM_MAPPED", 2)
    write(tmp_path, range(40), shard_bytes=1)
    cache = TeacherCache(tmp_path)
    assert len(shards(tmp_path)) == 40
    ids = [i for _ in range(5) for i in range(40)]
    random.Random(0).shuffle(ids)
    with ThreadPoolExecutor(8) as pool:
        for example_id, found in zip(ids, pool.map(cache.read, ids), strict=True):
            same_as_written(found, example_id)


def test_hidden_states_and_head(tmp_path: Path) -> None:
    hidden = np.arange(12, dtype=np.uint16).reshape(3, 4)
    weight = np.arange(VOCAB_SIZE * 4, dtype=np.uint16).reshape(VOCAB_SIZE, 4)
    write_head_and_states(tmp_path, hidden, weight)
    write_head(tmp_path, weight + 1, "bf16")  # another rank, which is late
    cache = TeacherCache(tmp_path)
    found = cache.read(1)
    assert isinstance(found, Hidden)
    assert (found.hidden == hidden).all()
    head, dtype = cache.head()
    assert dtype == "bf16"
    assert (head == weight).all()


def write_head_and_states(folder: Path, hidden: np.ndarray, weight: np.ndarray) -> None:
    with Writer(folder, HIDDEN_CARD) as writer:
        writer.add(1, Hidden(hidden, "bf16"))
        write_head(folder, weight, "bf16")


def test_torch_reads_the_head(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_tensors

    weight = torch.randn(VOCAB_SIZE, 4, dtype=torch.bfloat16)
    write_head_and_states(tmp_path, np.zeros((1, 4), np.uint16), weight.view(torch.uint16).numpy())
    assert (load_tensors(tmp_path / "head.safetensors")["weight"] == weight).all()
    head, _ = TeacherCache(tmp_path).head()
    assert (torch.from_numpy(head.copy()).view(torch.bfloat16) == weight).all()


# Nothing else is.


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_of_an_answer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(9), shard_bytes=2**20)
    (shard,) = shards(tmp_path)
    arrays = load_file(shard)
    start = shard.stat().st_size - arrays["data"].size
    for row, example_id in enumerate(arrays["ids"].tolist()):
        for place in (arrays["offsets"][row], arrays["offsets"][row + 1] - 1):
            flip(shard, int(start + place))
            cache = TeacherCache(tmp_path)
            with pytest.raises(ValueError, match=rf"{shard.name}: the answers of example {example_id:016x} .*checksum"):
                cache.read(example_id)
            flip(shard, int(start + place))
    check(tmp_path, range(9))


def test_a_flipped_bit_of_an_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(9), shard_bytes=2**20)
    (shard,) = shards(tmp_path)
    start = shard.stat().st_size - load_file(shard)["data"].size
    refused = 0
    for place in random.Random(0).sample(range(start), 60):
        before = shard.read_bytes()
        flip(shard, place)
        refusal = None
        try:
            TeacherCache(tmp_path)
        except ValueError as error:
            refusal = str(error)
        if refusal is None:  # it was a space of the header
            check(tmp_path, range(9))
        else:
            assert shard.name in refusal
            refused += 1
        shard.write_bytes(before)
    assert refused > 50


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_shard_is_refused(tmp_path: Path, share: float) -> None:
    write(tmp_path, range(30))
    shard = shards(tmp_path)[1]
    os.truncate(shard, int(shard.stat().st_size * share))
    with pytest.raises(ValueError, match=rf"{shard.name} is cut off or damaged .*Delete it and run cache_teacher_log"):
        TeacherCache(tmp_path)
    shard.unlink()
    cache = TeacherCache(tmp_path)
    lost = cache.missing(np.arange(30))
    assert 0 < len(lost) < 30
    write(tmp_path, lost.tolist())
    check(tmp_path, range(30))


def test_shards_of_another_card_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "one", range(3))
    write(tmp_path / "other", range(3), card=replace(CARD, teacher=replace(CARD.teacher, fingerprint="89ab")))
    (stranger,) = shards(tmp_path / "other")
    stranger.rename(tmp_path / "one" / "shards" / stranger.name)
    with pytest.raises(ValueError, match=rf"{stranger.name} is of another teacher"):
        TeacherCache(tmp_path / "one")


def test_a_renamed_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    shards(tmp_path)[0].rename(tmp_path / "shards" / f"{'0' * 16}.safetensors")
    with pytest.raises(ValueError, match="is not what was written: its name is the hash of another index"):
        TeacherCache(tmp_path)


def test_other_files_among_the_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    (tmp_path / "shards" / ".nfs0001").touch()
    (tmp_path / "shards" / ".0123.safetensors.77.88").touch()
    check(tmp_path, range(3))
    (tmp_path / "shards" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds what kdtune did not write there: notes.txt"):
        TeacherCache(tmp_path)
    (tmp_path / "shards" / "notes.txt").unlink()
    foreign = tmp_path / "shards" / f"{'0' * 16}.safetensors"
    foreign.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=rf"{foreign.name} is no shard of a teacher cache"):
        TeacherCache(tmp_path)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is no teacher cache: it has no card.json"):
            TeacherCache(folder)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds other files: model.safetensors"):
        Writer(tmp_path, CARD)
    for content in (b"", b"{}", b"\xff\x00"):
        (tmp_path / "card.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"card.json cannot be used: it is no card"):
            TeacherCache(tmp_path)


def test_shards_that_were_deleted_are_missing(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    shutil.rmtree(tmp_path / "shards")
    check(tmp_path, [])
    write(tmp_path, range(3))
    check(tmp_path, range(3))


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def answer() -> None:
        write(tmp_path, range(3, 6))

    write(tmp_path, range(3))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"shards.* could not be written: .*No space left.* stays"):
            answer()
    check(tmp_path, range(3))
    assert len(list(tmp_path.rglob(".*"))) == 0
    write(tmp_path, range(3, 6))
    check(tmp_path, range(6))


def test_another_may_have_begun_since_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(3))
    write_tokenizer(tmp_path, {"tokenizer.json": b"{}"})
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert open_to_extend(tmp_path, CARD) is None
    write(tmp_path, range(3, 6))
    check(tmp_path, range(6))


def test_a_lost_card_is_not_made_again(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    (tmp_path / "card.json").unlink()
    with pytest.raises(ValueError, match="shards without a card"):
        Writer(tmp_path, CARD)


def test_another_teacher_cannot_add(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    with pytest.raises(ValueError, match=r"store.bits is 8 in the cache and 16 here; tokenizer is 4567 .* and x here"):
        Writer(tmp_path, replace(CARD, store=StoreConfig("top_k", top_k=5, bits=16), tokenizer="x"))
    check(tmp_path, range(3))


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    write_head_and_states(tmp_path, np.zeros((1, 4), np.uint16), np.zeros((VOCAB_SIZE, 4), np.uint16))
    cache = TeacherCache(tmp_path)
    flip(path, path.stat().st_size - 3)
    with pytest.raises(ValueError, match=r"head.safetensors is not what was written"):
        cache.head()
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(ValueError, match=r"head.safetensors is cut off"):
        cache.head()
    path.unlink()
    with pytest.raises(ValueError, match=r"head.safetensors is missing"):
        cache.head()


def test_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    names = [".card.json.77.88", "shards/.0123.safetensors.77.88", "shards/.0124.safetensors.77.88", "shards/.nfs0001"]
    old, older, young, foreign = (tmp_path / name for name in names)
    for path in (old, older, young, foreign):
        path.touch()
    for path in (old, older, foreign):
        os.utime(path, (0, time.time() - 25 * 3600))
    write(tmp_path, [3])
    assert [path.exists() for path in (old, older, young, foreign)] == [False, False, True, True]
    check(tmp_path, range(4))


# Several processes.

NUM_IDS = 150


def write_rest(folder: Path, ids: list[int]) -> None:
    """A writer's process: it adds what is missing, in many small shards, and says how far it is."""
    card = replace(CARD, datasets=(Dataset({"rank": ids[0]}, 384, len(ids)),))
    missing = np.array(ids)
    if (folder / "card.json").exists():
        missing = missing[TeacherCache(folder).missing(missing)]
    with Writer(folder, card, shard_bytes=200) as writer:
        for example_id in missing.tolist():
            print(example_id, flush=True)
            writer.add(example_id, make_answers(example_id))


def start_writer(folder: Path, ids: list[int]) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, str(folder), json.dumps(ids)]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_writers_at_one_time(tmp_path: Path) -> None:
    """They make one cache, also where two have the same example."""
    parts = [list(range(start, start + 40)) for start in (0, 30)]
    writers = [start_writer(tmp_path, ids) for ids in parts]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    cache = check(tmp_path, range(70))
    assert sorted(dataset.settings["rank"] for dataset in cache.card.datasets) == [0, 30]


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_and_double_nothing(tmp_path: Path, num_kills: int) -> None:
    chance = random.Random(num_kills)
    kept: set[int] = set()
    for _ in range(num_kills):
        writer = start_writer(tmp_path, list(range(NUM_IDS)))
        assert writer.stdout is not None
        for _ in range(chance.randint(1, 2 * NUM_IDS // num_kills)):
            writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.004))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        if (tmp_path / "card.json").exists():
            found = set(TeacherCache(tmp_path).ids.tolist())
            assert kept <= found
            kept = found
    assert kept, "it was killed too early to tell anything"
    writer = start_writer(tmp_path, list(range(NUM_IDS)))
    rest, _ = writer.communicate()
    assert {int(line) for line in rest.split()} == set(range(NUM_IDS)) - kept
    check(tmp_path, range(NUM_IDS))
    assert num_rows(tmp_path) == NUM_IDS


if __name__ == "__main__":
    arguments: list[Any] = sys.argv[1:]
    write_rest(Path(arguments[0]), json.loads(arguments[1]))
