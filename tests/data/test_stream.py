"""A stream deals out each row of a pass once, mixed, and goes on after any step as if it had never stopped."""

from __future__ import annotations

import gzip
import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import tokenizer_folders as folders
import torch
from pyarrow import parquet

from kdtune import data, tokenizers
from kdtune.data import Batch, DatasetConfig, Examples, Share, StreamLoader
from kdtune.data.batch import ALL
from kdtune.data.ids import example_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*of its rows")  # sets of a few odd ones

COUNTS = (7, 0, 12, 4)  # rows of the files
TEXTS = [f"{i} the fox jumps over {i * i} dogs" for i in range(sum(COUNTS))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.load(folders.qwen(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(params=["jsonl", "jsonl.gz", "csv", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "rows", request.param)


def write(folder: Path, kind: str = "jsonl") -> Path:
    """Four files, one of which is empty."""
    folder.mkdir()
    start = 0
    for number, count in enumerate(COUNTS):
        path = folder / f"part-{number}.{kind}"
        texts = TEXTS[start : start + count]
        start += count
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path)
        elif kind == "csv":
            path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
        else:
            content = "\n".join(json.dumps({"text": text}) + "\n" for text in texts)  # with empty lines between
            path.write_bytes(gzip.compress(content.encode()) if kind.endswith("gz") else content.encode())
    return folder


def stream(source: Path, tokenizer: tokenizers.Tokenizer, max_seq_len: int = 64, **settings: Any) -> data.Stream:
    settings = {"format": "text", "streaming": True, "shuffle_buffer": 5, **settings}
    return data.Stream(DatasetConfig(source=str(source), **settings), tokenizer, max_seq_len)


def loader(opened: data.Stream, batch_size: int = 2, accumulation: int = 2, **settings: Any) -> StreamLoader:
    return StreamLoader(opened, batch_size=batch_size, gradient_accumulation_steps=accumulation, **settings)


def ids(step: list[Batch]) -> list[int]:
    """Which examples a step has: all of their tokens are labelled."""
    found = []
    for batch in step:
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            length = int((labels != data.IGNORE).sum())
            if length:
                document = np.array([*tokens[:length].tolist(), int(labels[length - 1])], np.int32)
                is_label = np.arange(length + 1) > 0
                found.append(int(example_ids(document, is_label, np.array([length + 1]))[0]))
    return found


def snapshot(step: list[Batch]) -> list[Any]:
    return [[batch.tokens.tolist(), batch.labels.tolist()] for batch in step]


def whole(source: Path, tokenizer: tokenizers.Tokenizer, max_seq_len: int = 64, **settings: Any) -> Examples:
    examples = data.load(DatasetConfig(source=str(source), format="text", **settings), tokenizer, max_seq_len)
    assert isinstance(examples, Examples)
    return examples


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("max_seq_len", [64, 7])
def test_a_pass_holds_each_example_once(
    shuffle: bool, max_seq_len: int, source: Path, tokenizer: tokenizers.Tokenizer
) -> None:
    made = loader(stream(source, tokenizer, max_seq_len, shuffle_buffer=5 if shuffle else None), shuffle=shuffle)
    expected = whole(source, tokenizer, max_seq_len).ids.tolist()
    orders = []
    for epoch in range(3):
        orders.append([])
        while made.epoch == epoch:
            orders[-1] += ids(made.next_step())
        assert sorted(orders[-1]) == sorted(expected)
    if shuffle:
        assert len({tuple(order) for order in orders}) == 3
        assert expected not in orders
    else:
        assert [sorted(order[i : i + 4]) for order in orders for i in range(0, len(expected), 4)] == 3 * [
            sorted(expected[i : i + 4]) for i in range(0, len(expected), 4)
        ]


@pytest.mark.parametrize("buffer", [1, 5, 1000])
@pytest.mark.parametrize("max_seq_len", [64, 7])
def test_going_on_after_any_step(
    buffer: int, max_seq_len: int, source: Path, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    opened = stream(source, tokenizer, max_seq_len, shuffle_buffer=buffer)
    uninterrupted = loader(opened, seed=3)
    states, steps = [], []
    while uninterrupted.epoch < 2:
        states.append(json.dumps(uninterrupted.state_dict()))
        steps.append(snapshot(uninterrupted.next_step()))
    for stop, state in enumerate(states):
        resumed = loader(opened, seed=3)
        resumed.load_state_dict(json.loads(state))
        assert resumed.state_dict() == json.loads(state)
        assert [snapshot(resumed.next_step()) for _ in steps[stop : stop + 4]] == steps[stop : stop + 4]


def test_order_depends_on_seed_only_and_neighbours_are_parted(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    opened = stream(write(tmp_path / "rows"), tokenizer, shuffle_buffer=1000)
    first, again, other = (
        [id for _ in range(5) for id in ids(loader(opened, seed=seed).next_step())] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_ranks_share_each_step(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    opened = stream(write(tmp_path / "rows"), tokenizer)
    alone = loader(opened, batch_size=2, accumulation=3, seed=4)
    ranks = [loader(opened, batch_size=2, accumulation=1, seed=4, share=Share(rank, 3)) for rank in range(3)]
    state = None
    while alone.epoch == 0:
        steps = [rank.next_step() for rank in ranks]
        assert len({len(step) for step in steps}) == 1
        assert sorted(ids([batch for step in steps for batch in step])) == sorted(ids(alone.next_step()))
        state = state or ranks[0].state_dict()
    alone, halves = (loader(opened, seed=4, share=share) for share in (ALL, Share(slice=1, num_slices=2)))
    for rows, right in zip(alone.next_step(), halves.next_step(), strict=True):
        assert torch.equal(right.tokens[:, : rows.tokens.size(1) // 2], rows.tokens[:, right.tokens.size(1) :])
    resumed = loader(opened, batch_size=1, accumulation=6, seed=4)
    resumed.load_state_dict(state)  # another split of a step, and other ranks
    assert sorted(ids(resumed.next_step())) != []


def test_skipped_rows_are_told_once_and_counted_in_each_pass(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    path.write_text(good + "broken\n" + '{"text": null}\n' + good + "broken, and last\n")
    opened = stream(path, tokenizer, on_error="skip")
    made = loader(opened)
    assert capsys.readouterr().out.count("dataset: skipped") == 3, "among the first rows"
    states, steps = [], []
    while made.epoch < 2:
        states.append(made.state_dict())
        steps.append(ids(made.next_step()))
    assert sum(map(len, steps)) == 2 * 2 * len(TEXTS)
    passes = [f"dataset: 3 rows skipped in pass {number}\n" for number in (1, 2)]
    assert capsys.readouterr().out == "".join(passes)
    for stop, state in enumerate(states):
        resumed = loader(opened)
        resumed.load_state_dict(state)
        assert not capsys.readouterr().out, "the rows of the buffer are read again"
        assert [ids(resumed.next_step()) for _ in steps[stop:]] == steps[stop:]
        assert resumed.epoch == 2
        assert capsys.readouterr().out == "".join(passes[state["epoch"] :])


def test_of_many_skipped_rows_the_first_are_told(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "the fox"}\n' + "broken\n" * 400)
    made = loader(stream(tmp_path / "rows.jsonl", tokenizer, on_error="skip"))
    made.next_step()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6
    assert told[-1] == "dataset: 400 rows skipped in pass 1"


def test_first_rows_that_cannot_be_used(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "the fox"}) + "\nbroken\n")
    with pytest.raises(ValueError, match=r"^dataset: .*rows\.jsonl, line 2, column 1: broken json"):
        loader(stream(path, tokenizer))
    path.write_text("broken\n" * 300 + json.dumps({"text": "the fox"}))
    message = r"^dataset: the first 256 rows of .*rows\.jsonl were all skipped, the first: .*, line 1, column 1"
    with pytest.raises(ValueError, match=message):
        loader(stream(path, tokenizer, on_error="skip"))


def test_the_order_of_files_and_the_choice_in_a_step_are_drawn_apart(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    """Numpy takes (seed, n, 0) for (seed, n): an order of that key would repeat the numbers of step n."""
    made = loader(stream(write(tmp_path / "rows"), tokenizer), seed=3)
    many = SimpleNamespace(rows=SimpleNamespace(shards=[None] * 50))
    made.stream = many  # type: ignore[assignment]
    of_steps = [np.random.default_rng([3, step]).permutation(50).tolist() for step in range(5)]
    for made.epoch in range(5):
        assert made._order().tolist() not in of_steps


def test_summary(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    opened = stream(write(tmp_path / "rows"), tokenizer)
    run = data.RunData(loader(opened), 10, None, {})
    assert run.summary().startswith(f"dataset (first rows): {len(TEXTS)} rows, ")
    assert run.summary().endswith("streamed from 4 files through a buffer of 5 examples")
    unsaid = stream(tmp_path / "rows", tokenizer, shuffle_buffer=None)
    assert loader(unsaid, shuffle=False).summary() == "streamed from 4 files"
    assert loader(unsaid).summary() == "streamed from 4 files through a buffer of 10,000 examples"
    with pytest.raises(ValueError, match=r"dataset\.shuffle_buffer=5 mixes rows, and shuffle=false keeps them"):
        loader(opened, shuffle=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packed": True}, "dataset.packed is for sets that are tokenised before"),
        ({"group_by_length": True}, "dataset.group_by_length is for sets"),
        ({"join_documents": True}, "dataset.join_documents is for sets"),
        ({"num_workers": 2}, "dataset.num_workers is for sets"),
        ({"cache_dir": "cache"}, "dataset.cache_dir is for sets"),
        ({"split": "train[:90%]"}, r"not a part: dataset\.split=train\[:90%\]"),
        ({"source": None}, "has no rows"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], message: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    cfg = DatasetConfig(**{"source": str(write(tmp_path / "rows")), "format": "text", "streaming": True, **settings})
    with pytest.raises(ValueError, match=message):
        data.Stream(cfg, tokenizer, 64)


def test_resuming_with_other_rows_or_settings_is_refused(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows")
    made = loader(stream(source, tokenizer))
    made.next_step()
    state = made.state_dict()
    for other, message in [
        (loader(stream(source, tokenizer), seed=1), "seed changed"),
        (loader(stream(source, tokenizer, shuffle_buffer=None), shuffle=False), "shuffle changed"),
        (loader(stream(source, tokenizer), batch_size=3), r"batch_size .* \(times ranks\) changed .*4 then, 6 now"),
        (loader(stream(source, tokenizer, shuffle_buffer=6)), r"dataset\.shuffle_buffer changed"),
        (loader(stream(source, tokenizer, 7)), "the rows"),
    ]:
        with pytest.raises(ValueError, match=f"cannot continue in dataset: {message}"):
            other.load_state_dict(state)
    read = data.Loader(whole(source, tokenizer), batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"of a run with dataset\.streaming=true"):
        read.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of a run without dataset\.streaming=true"):
        made.load_state_dict(read.state_dict())
    (source / "part-3.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(ValueError, match="the rows"):
        loader(stream(source, tokenizer)).load_state_dict(state)


def test_a_stream_of_the_hub(tokenizer: tokenizers.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(path) for path in sorted(write(tmp_path / "rows").glob("*.jsonl")) if path.stat().st_size]
    load_dataset = datasets.load_dataset

    def local(name: str, subset: str | None, *, split: str, streaming: bool, revision: str) -> Any:
        assert (name, split, revision) == ("owner/set", "train", "0123456789")
        return load_dataset("json", data_files=files, split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda name: SimpleNamespace(sha="0123456789"))
    opened = stream(Path("owner/set"), tokenizer)
    assert next(shard.name for shard in opened.rows.shards) == "owner/set@01234567 (train), shard 1"
    assert len(opened.rows.shards) == 3
    made = loader(opened)
    found = []
    while made.epoch == 0:
        state = made.state_dict()
        found.append(ids(made.next_step()))
    assert sorted(chain.from_iterable(found)) == sorted(whole(tmp_path / "rows", tokenizer).ids.tolist())
    resumed = loader(opened)
    resumed.load_state_dict(state)
    assert ids(resumed.next_step()) == found[-1]
