"""Rows that are too long or cannot be used; the same examples from any number of processes and from the cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_folders as folders
import torch

from kdtune import data, tokenizers
from kdtune.data import DatasetConfig, Examples, cache, rows, workers
from kdtune.data.encoding import RowEncoder
from kdtune.interrupt import Interrupt

pytestmark = pytest.mark.filterwarnings("ignore:.*of its rows")  # sets of a few odd ones

TEXT = "the quick brown fox jumps over the lazy dog and does not mind it"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.load(folders.qwen(tmp_path_factory.mktemp("tokenizer")))


def pairs(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, no two alike."""
    return [
        {"prompt": f"{i} " + " ".join(WORDS[: i % 9]), "completion": " ".join(WORDS[i % 5 : i % 13 + 1]) or "yes"}
        for i in range(count)
    ]


def write(path: Path, columns: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in columns))
    return str(path)


def load(source: str, tokenizer: tokenizers.Tokenizer, max_seq_len: int = 64, **settings: Any) -> Examples:
    settings.setdefault("format", "completion")
    vocab_size = settings.pop("vocab_size", None)
    return data.load(DatasetConfig(source=source, **settings), tokenizer, max_seq_len, vocab_size=vocab_size)


def contents(examples: Examples) -> list[Any]:
    return [[tensor.tolist() for tensor in examples[i]] for i in range(len(examples))]


def assert_same(one: Examples, other: Examples) -> None:
    for name in ("tokens", "is_label", "offsets", "ids", "rows"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert one.counts == other.counts
    assert one.summary() == other.summary()
    assert one.fingerprint == other.fingerprint


# Too long.


def test_too_long(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    long_and_short = [{"prompt": "the dog", "completion": TEXT}, {"prompt": "fox", "completion": "yes"}]
    source = write(tmp_path / "rows.jsonl", long_and_short)
    whole = load(source, tokenizer)
    (tokens, labels), short = contents(whole)
    assert len(tokens) > 12
    size = 5
    cut = load(source, tokenizer, size, too_long="truncate")
    assert contents(cut) == [[tokens[:size], labels[:size]], short]
    assert contents(load(source, tokenizer, size)) == contents(cut)
    assert "1 row truncated to 5 tokens" in cut.summary()
    pieces = load(source, tokenizer, size, too_long="split")
    expected = [[tokens[i : i + size], labels[i : i + size]] for i in range(0, len(tokens), size)]
    assert contents(pieces) == [*expected, short]
    assert pieces.num_labels == whole.num_labels, "every label once"
    assert "1 row split into examples of 5 tokens" in pieces.summary()
    dropped = load(source, tokenizer, size, too_long="drop")
    assert contents(dropped) == [short]
    assert "1 row lost (1 longer than max_seq_len)" in dropped.summary()
    assert load(source, tokenizer, len(tokens), too_long="drop").num_labels == whole.num_labels, "just fits"


def test_examples_know_their_rows(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdtune.data.prepare._CHUNK_SIZE", 2)
    long = {"prompt": "the", "completion": TEXT}
    columns = [*pairs(3), {"prompt": "no answer"}, long, {"prompt": TEXT, "completion": "fox"}, *pairs(8)[3:]]
    source = write(tmp_path / "rows.jsonl", columns)
    size = 9
    for settings in ({}, {"split": "[2:]"}, {"cache_dir": str(tmp_path / "cache")}):
        examples = load(source, tokenizer, size, on_error="skip", too_long="split", **settings)
        assert examples.source is not None
        found = examples.source.find(set(examples.rows.tolist()))
        for i, row in enumerate(examples.rows.tolist()):
            shown = tokenizer.decode(examples[i][0].tolist())
            whole = found[row].columns["prompt"] + found[row].columns["completion"]
            assert shown in whole, f"example {i}"
        assert np.bincount(examples.rows).max() == 3
    joined = load(
        write(tmp_path / "text.jsonl", [{"text": TEXT}] * 3), tokenizer, 4, format="text", join_documents=True
    )
    assert set(joined.rows.tolist()) == {-1}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            [{"prompt": "a", "completion": TEXT}] * 2 + pairs(1) * 9,
            "of its rows 18.2% are truncated to 8 tokens. Look at them, or raise tokenizer.max_seq_len.",
        ),
        (
            [{"prompt": TEXT, "completion": "a"}, {"prompt": "a", "completion": ""}] + pairs(1) * 9,
            "of its rows 18.2% are lost (1 prompt alone longer than max_seq_len, 1 empty answer). Look at them, or "
            "raise tokenizer.max_seq_len.",
        ),
        ([{"prompt": "a", "completion": TEXT}] + pairs(1) * 9, None),
    ],
)
def test_much_that_is_lost_or_truncated_makes_a_warning(
    columns: list[dict[str, Any]], told: str | None, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"on_error": "skip", "cache_dir": str(tmp_path / "cache")}
    source = write(tmp_path / "rows.jsonl", columns)
    for _ in ("written", "found"):
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            load(source, tokenizer, 8, **settings)
        assert [str(one.message) for one in given] == ([f"dataset: {told}"] if told else [])


def test_text_may_be_cut_or_dropped_too(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": TEXT}, {"text": "fox"}])
    ids = tokenizer.encode(TEXT, eos=True)
    split, truncated, dropped = (
        load(source, tokenizer, 4, format="text", too_long=too_long) for too_long in (None, "truncate", "drop")
    )
    assert [token for tokens, _ in contents(split)[:-1] for token in tokens] == ids[:-1]
    assert contents(truncated) == [[ids[:4], ids[1:5]], contents(split)[-1]]
    assert contents(dropped) == contents(split)[-1:]


@pytest.mark.parametrize("max_seq_len", [1, 3, 7, 1000])
def test_joined_documents(
    max_seq_len: int, tokenizer: tokenizers.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdtune.data.prepare._CHUNK_SIZE", 2)
    texts = ["the fox", "dog", "", TEXT, "it"]
    source = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    examples = load(source, tokenizer, max_seq_len, format="text", join_documents=True)
    ids = [id for text in texts if text for id in tokenizer.encode(text, eos=True)]
    assert [id for tokens, _ in contents(examples) for id in tokens] == ids[:-1]
    assert [id for _, labels in contents(examples) for id in labels] == ids[1:]
    assert set(examples.lengths[:-1].tolist()) <= {max_seq_len}
    assert (examples.num_rows, examples.counts.num_unlabelled, examples.num_labels) == (5, 1, len(ids) - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"join_documents": True}, r"dataset.join_documents=true is for dataset.format=text and tokens"),
        (
            {"format": "text", "join_documents": True, "packed": True},
            r"dataset.packed=true fills rows with whole documents",
        ),
        ({"format": "text", "join_documents": True, "too_long": "drop"}, r"dataset.too_long=drop says nothing"),
        ({"document_end_id": 3}, "dataset.document_end_id is for dataset.format=tokens"),
        ({"token_dtype": "uint16"}, "dataset.token_dtype is for dataset.format=tokens"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], message: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "rows.jsonl", pairs(1)), tokenizer, **settings)


# Rows that cannot be used.


def broken(tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    """A file of ten good rows with six kinds of trouble among them, and the good rows."""
    good = pairs(10)
    lines = [json.dumps(row) for row in good]
    for place, line in [
        (9, '{"prompt": "a", "completion": "b" "c"}'),
        (8, '{"prompt": "a", "answer": "b"}'),
        (6, '{"prompt": "a", "completion": ""}'),
        (5, '{"prompt": "a", "completion": null}'),
        (3, '["a", "b"]'),
        (2, '{"prompt": "a", "completion": ["b"]}'),
        (1, '{"prompt": "a", "comp'),
    ]:
        lines.insert(place, line)
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    return str(path), good


def test_skipped_rows_are_counted_by_kind_and_told(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, good = broken(tmp_path)
    examples = load(source, tokenizer, on_error="skip")
    assert contents(examples) == contents(load(write(tmp_path / "good.jsonl", good), tokenizer))
    kinds = {"broken json": 2, "wrong type": 1, "not an object": 1, "null": 1, "empty answer": 1}
    assert examples.counts.skipped == {**kinds, "missing column": 1, "not UTF-8": 1}
    assert examples.num_rows == 18
    assert "8 rows lost (2 broken json, 1 empty answer, 1 missing column," in examples.summary()
    assert f"; the first skipped: {source}, line 2, column " in examples.summary()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5
    assert told[0].startswith(f"dataset: skipped {source}, line 2, column 17: broken json: Unterminated string")
    assert told[1].startswith(f"dataset: skipped line 4 of {source}: column 'completion' is a list")


def test_broken_json_far_into_a_file(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 9999 + '{"prompt": "a", completion: "b"}\n')
    message = r"^dataset: .*rows\.jsonl, line 10,000, column 17: broken json: Expecting property name .*on_error=skip"
    with pytest.raises(ValueError, match=message):
        load(str(path), tokenizer)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_a_character(name: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    content = [{"prompt": "a", "completion": "\U0001f600"}, {"prompt": "a", "completion": "\ud83d"}]
    path = tmp_path / name
    path.write_text(json.dumps(content) if name == "rows.json" else "\n".join(map(json.dumps, content)))
    with pytest.raises(rows.BadRow, match=r"(line|row) 2 of .*half of a character"):
        load(str(path), tokenizer)
    examples = load(str(path), tokenizer, on_error="skip")
    assert examples.counts.skipped == {"not Unicode": 1}
    assert len(examples) == 1


def test_json_that_is_nested_too_deeply(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(rows.BadRow, match=r"rows\.jsonl, line 1: broken json: it is nested too deeply"):
        load(str(path), tokenizer)


def test_nothing_but_skipped_rows(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "a"}] * 3)
    with pytest.raises(
        ValueError, match=r"^dataset: the 3 rows of .* were all skipped, the first: line 1 of .*no column"
    ):
        load(source, tokenizer, on_error="skip")


def test_ids_outside_of_the_vocabulary_may_be_skipped(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "the fox", "completion": "a"}] * 2)
    vocab_size = tokenizer.eos_id + 1
    assert load(source, tokenizer, vocab_size=vocab_size).num_rows == 2
    with pytest.raises(
        ValueError, match=r"the 2 rows of .* were all skipped, the first: line 1 of .*the token '<\|im_end\|>'"
    ):
        load(source, tokenizer, vocab_size=vocab_size - 1, on_error="skip")


# Processes.


def test_any_number_of_processes_makes_the_same_examples(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*pairs(900), {"prompt": "a"}, *pairs(700), {"completion": "a"}])
    settings: dict[str, Any] = {"max_seq_len": 16, "too_long": "split", "on_error": "skip"}
    here = load(source, tokenizer, **settings)
    assert here.counts.skipped == {"missing column": 2}
    assert_same(load(source, tokenizer, num_workers=2, **settings), here)


def test_errors_in_other_processes_name_their_place(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*pairs(700), {"prompt": "a"}])
    with pytest.raises(rows.BadRow, match=r"^dataset: line 701 of .*no column 'completion'"):
        load(source, tokenizer, num_workers=1)


@pytest.mark.parametrize("kind", ["llama3", "llama2", "tiktoken"])
def test_tokenizers_go_to_other_processes(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(getattr(folders, kind)(tmp_path / "tokenizer"))
    encode = RowEncoder(DatasetConfig(source="", format="completion"), tokenizer, 64, "dataset", None)
    chunk = [rows.Row(columns, "file", "row", i) for i, columns in enumerate(pairs(20))]
    here, there = encode(chunk), pickle.loads(pickle.dumps(encode))(chunk)
    assert all(np.array_equal(one, other) for one, other in zip(here[:4], there[:4], strict=True))
    assert here.counts == there.counts


PROGRAM = """
import sys, time
import workers  # by itself: it needs nothing else of kdtune, and starts without torch

def slow(item):
    time.sleep(0.05)
    return item

if __name__ == "__main__":
    print("ready", flush=True)
    workers.START_METHOD = sys.argv[1]
    for result in workers.ordered_map(slow, range(10_000), 2):
        print(result, flush=True)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"] if sys.platform == "linux" else ["spawn"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_leaves_no_process(number: signal.Signals, method: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(workers.__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, path, method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines == ["ready\n", "0\n", "1\n", "2\n"]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it: to all of them
    else:
        process.kill()
    _, errors = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors
        assert errors.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("processes are left")


def end_at_three(item: int) -> int:
    if item == 3:
        os._exit(1)
    time.sleep(0.01 if item < 3 else 30)
    return item


def test_a_process_that_ends_by_itself_stops_the_run() -> None:
    """Also during training, where SIGTERM asks for an end and does not make it: the others are ended by that signal."""
    with Interrupt(), pytest.raises(ValueError, match="one of the 2 processes that tokenise ended by itself"):
        list(workers.ordered_map(end_at_three, range(10_000), 2))
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_what_other_threads_do_does_not_stop_a_process(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Threads of torch, and a thread that tokenises."""
    source = write(tmp_path / "rows.jsonl", pairs(300))
    here = load(source, tokenizer)
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            tokenizer.encode("the lazy dog")
            torch.ones(300, 300) @ torch.ones(300, 300)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for thread in threads:
            thread.start()
        for _ in range(10):
            assert_same(load(source, tokenizer, num_workers=2), here)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(num_threads)


# Cache.


def cached(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def test_the_second_time_rows_come_from_the_cache(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", [*pairs(1000), {"prompt": "a", "completion": ""}])
    settings: dict[str, Any] = {"on_error": "skip", "max_seq_len": 16}
    plain = load(source, tokenizer, **settings)
    settings["cache_dir"] = str(tmp_path / "cache")
    assert_same(load(source, tokenizer, **settings), plain)
    monkeypatch.setattr("kdtune.data.files._read_lines", None)
    again = load(source, tokenizer, **settings)
    assert_same(again, plain)
    assert contents(again) == contents(plain)
    assert isinstance(again.tokens, np.memmap)
    assert np.array_equal(np.load(cached(tmp_path) / "tokens.npy"), plain.tokens)


def test_what_makes_another_set(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    source = write(path, pairs(20))
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    number = Counter[str]()

    def count(what: str, tokenizer: tokenizers.Tokenizer = tokenizer, **others: Any) -> None:
        load(source, tokenizer, **settings, **others)
        number[what] = len(list((tmp_path / "cache").iterdir()))

    count("first")
    count("the same again")
    count("processes", num_workers=1)
    count("rows dealt out otherwise", packed=True)
    assert set(number.values()) == {1}
    count("max_seq_len", max_seq_len=9)
    count("split", split="[:10]")
    count("train_on_input", train_on_input=True)
    count("too_long", too_long="drop")
    count("the default of too_long", too_long="truncate")
    count("models with more ids", vocab_size=10_000)
    status = path.stat()
    write(path, [*pairs(10), *pairs(10)[::-1]])
    count("content")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    count("time")
    folder = folders.qwen(tmp_path / "other")
    count("another place of the same tokenizer", tokenizers.load(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    count("tokenizer", tokenizers.load(folder))
    assert list(number.values())[4:] == [2, 3, 4, 5, 5, 5, 6, 7, 7, 8]


def test_models_with_fewer_ids_are_told_of_a_cached_row(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(20))
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    load(source, tokenizer, vocab_size=tokenizer.eos_id + 1, **settings)
    with pytest.raises(ValueError, match=rf"^dataset: a row of {source} has the token '<\|im_end\|>' with id 502, but"):
        load(source, tokenizer, vocab_size=tokenizer.eos_id, **settings)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_where_rows_are_skipped_the_vocabulary_makes_another_set(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"tokens": [1, 2, 3]}, {"tokens": [1, 700]}, {"tokens": [1, 1000]}])
    settings: dict[str, Any] = {"format": "tokens", "cache_dir": str(tmp_path / "cache"), "on_error": "skip"}
    assert [len(load(source, tokenizer, vocab_size=size, **settings)) for size in (1001, 1000, 700)] == [3, 2, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    text = write(tmp_path / "text.jsonl", pairs(20))  # whose ids are all of the tokenizer
    for size in (None, tokenizer.vocab_size, tokenizer.vocab_size + 64):
        load(text, tokenizer, vocab_size=size, cache_dir=str(tmp_path / "other"), on_error="skip")
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_where_the_rows_came_from_is_told(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(20))
    load(source, tokenizer)
    assert not capsys.readouterr().out
    for what in ("written to", "found in"):
        load(source, tokenizer, cache_dir=str(tmp_path / "cache"))
        assert capsys.readouterr().out == f"dataset: tokenised rows {what} {cached(tmp_path)}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens.npy", -4, r"tokens\.npy has .* bytes instead of"),
        ("ids.npy", None, r"ids\.npy has 0 bytes"),
        ("meta.json", -100, r"meta\.json cannot be read"),
        ("meta.json", b"{}", r"meta\.json cannot be read \(KeyError: 'sizes'\)"),
        ("tokens.npy", 0, r"example 0 is not what was written"),
        ("offsets.npy", 0, r"the borders of the examples do not fit"),
        ("is_label.npy", b"x" * 300, r"is_label\.npy has 300 bytes"),
    ],
)
def test_damaged_sets_are_named_and_made_again(
    name: str,
    content: Any,
    message: str,
    tokenizer: tokenizers.Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(100))
    plain = load(source, tokenizer)
    load(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    path = cached(tmp_path) / name
    if content is None:
        path.unlink()
    elif content == 0:  # as long as it was, but empty: what a crash of the machine leaves
        size = path.stat().st_size
        os.truncate(path, 128)
        os.truncate(path, size)
    elif isinstance(content, int):
        os.truncate(path, path.stat().st_size + content)
    else:
        path.write_bytes(content)
    capsys.readouterr()
    assert_same(load(source, tokenizer, cache_dir=str(tmp_path / "cache")), plain)
    damage, written = capsys.readouterr().out.splitlines()
    assert damage.endswith("The rows are tokenised again.")
    assert re.search(message, damage)
    assert written == f"dataset: tokenised rows written to {path.parent}"
    assert_same(load(source, tokenizer, cache_dir=str(tmp_path / "cache")), plain)
    assert capsys.readouterr().out == f"dataset: tokenised rows found in {path.parent}\n"
    assert list(path.parents[1].iterdir()) == [path.parent]


def test_what_others_put_there_is_not_deleted(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(10))
    load(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    (cached(tmp_path) / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds what kdtune did not write there: notes\.txt"):
        load(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    assert len(list(cached(tmp_path).iterdir())) == 7


def test_a_file_is_no_cache_dir(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(1))
    with pytest.raises(NotADirectoryError, match=r"^dataset\.cache_dir=.*rows\.jsonl is a file"):
        load(source, tokenizer, cache_dir=source)


def test_a_failure_leaves_nothing(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*pairs(600), {"prompt": "a"}])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"line 601 of .*no column 'completion'"):
            load(source, tokenizer, cache_dir=str(tmp_path / "cache"))
        assert not list((tmp_path / "cache").iterdir())


def test_the_slower_of_two_writers_takes_what_is_there(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(10))
    plain = load(source, tokenizer, cache_dir=str(tmp_path / "cache"))
    folder = cached(tmp_path)
    key = json.loads((folder / "meta.json").read_text())["key"]
    cache.write(folder, key, [])
    found = cache.read(folder, key, "dataset", 64)
    assert found is not None
    assert_same(found, plain)
    assert list((tmp_path / "cache").iterdir()) == [folder]


@pytest.mark.parametrize("times", [1, 2])
def test_a_set_that_another_process_removes_is_written_once_more(
    times: int, tokenizer: tokenizers.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that find a set damaged, the slower may remove what the faster has written in its place."""
    source = write(tmp_path / "rows.jsonl", pairs(10))
    plain = load(source, tokenizer)
    write_set, left = cache.write, [True] * times

    def write_and_lose(folder: Path, *arguments: Any) -> None:
        write_set(folder, *arguments)
        if left:
            left.pop()
            cache.remove(folder)

    monkeypatch.setattr(cache, "write", write_and_lose)
    if times == 1:
        assert_same(load(source, tokenizer, cache_dir=str(tmp_path / "cache")), plain)
    else:
        with pytest.raises(OSError, match="written twice and is not there"):
            load(source, tokenizer, cache_dir=str(tmp_path / "cache"))


def test_removing_what_another_process_removed(tmp_path: Path) -> None:
    cache.remove(tmp_path / "rows-0123456789abcdef")
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_is_deleted_after_a_day(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", pairs(10))
    folder, now = tmp_path / "cache", time.time()
    ages = {
        "rows-0123456789abcdef.1.2": 25,
        "rows-0123456789abcdef.1.3": 23,
        "hidden": 99,
        "mine-0123456789abcdef.1.4": 99,
    }
    for name, hours in ages.items():
        (folder / f".{name}").mkdir(parents=True)
        file = folder / f".{name}" / ("notes.txt" if name.startswith("mine") else "tokens.npy")
        file.write_bytes(b"0")
        for path in (file, file.parent):
            os.utime(path, (now, now - hours * 3600))
    os.utime(folder / ".rows-0123456789abcdef.1.3", (now, now - 99 * 3600))  # the folder itself does not change
    load(source, tokenizer, cache_dir=str(folder))
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left == {f".{name}" for name in ages} - {".rows-0123456789abcdef.1.2"}


def test_one_file_of_many_is_enough_to_tell_sets_apart(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in "ab":
        write(tmp_path / "rows" / f"{name}.jsonl", pairs(5))
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    assert len(load(str(tmp_path / "rows"), tokenizer, **settings)) == 10
    write(tmp_path / "rows" / "b.jsonl", pairs(6))
    assert len(load(str(tmp_path / "rows"), tokenizer, **settings)) == 11
