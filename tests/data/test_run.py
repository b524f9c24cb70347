"""What a run reads: refused before a row is looked at where that is possible, and nothing kept that is made anew."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizer_folders as folders
import torch

from kdtune import data, tokenizers
from kdtune.data import DatasetConfig
from kdtune.data.config import WeightedSourceConfig
from kdtune.data.encoding import RowEncoder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.load(folders.qwen(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    texts = ("the quick brown fox " * (1 + i % 4) + str(i) for i in range(30))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def load(
    tokenizer: tokenizers.Tokenizer, dataset: DatasetConfig, dataset_val: DatasetConfig | None = None, **settings: Any
) -> data.RunData:
    defaults = {"batch_size": 4, "gradient_accumulation_steps": 1, "epochs": 1, "max_steps_per_epoch": None}
    defaults |= {"max_steps": None, "shuffle": True, "seed": 0}
    sections = {"dataset": dataset, "dataset_val": dataset_val, "tokenizer": SimpleNamespace(max_seq_len=64)}
    return data.load_run(SimpleNamespace(**sections, **{**defaults, **settings}), tokenizer)


def blend(source: str, *sources: dict[str, Any], **settings: Any) -> DatasetConfig:
    """Sources a, b, ... of the same rows, unless they say otherwise."""
    common = {"source": source, "format": "text"}
    named = {name: WeightedSourceConfig(**{**common, **own}) for name, own in zip("abc", sources, strict=False)}
    return DatasetConfig(sources=named, **settings)


def test_what_is_loaded(tokenizer: tokenizers.Tokenizer, source: str) -> None:
    plain = DatasetConfig(source=source, format="text")
    run = load(tokenizer, plain, blend(source, {}, {}), epochs=3, max_steps_per_epoch=5)
    assert (run.num_steps, run.loader.steps_per_epoch) == (15, 5)
    assert list(run.val_batches) == ["a", "b"]
    stream = load(tokenizer, DatasetConfig(source=source, format="text", streaming=True), plain, max_steps=7)
    assert (stream.num_steps, list(stream.val_batches)) == (7, ["dataset_val"])
    assert load(tokenizer, plain).val_batches == {}


@pytest.mark.parametrize(
    ("dataset", "dataset_val", "settings", "message"),
    [
        ({"packed": True, "group_by_length": True}, None, {}, r"dataset\.group_by_length=true is for rows of one doc"),
        ({}, {"packed": True, "group_by_length": True}, {}, r"dataset_val\.group_by_length=true is for rows of one"),
        ({"group_by_length": True}, None, {"shuffle": False}, r"dataset\.group_by_length=true .* shuffle=false"),
        ({"packed": True, "join_documents": True}, None, {}, r"dataset\.packed=true .* dataset\.join_documents=true"),
        ({}, {"packed": True, "join_documents": True}, {}, r"dataset_val\.packed=true .* dataset_val\.join_documents"),
        ({}, {"streaming": True}, {}, r"dataset_val\.streaming=true is for training"),
        ({"shuffle_buffer": 5}, None, {}, r"dataset\.shuffle_buffer=5 is for dataset\.streaming=true"),
        ({}, {"shuffle_buffer": 5}, {}, r"dataset_val\.shuffle_buffer=5 is for dataset_val\.streaming=true"),
        ({"streaming": True}, None, {}, "dataset.streaming=true does not know .* Give max_steps"),
        ({"streaming": True}, None, {"max_steps": 7, "epochs": 2}, "dataset.streaming=true does not know .* max_steps"),
        ({"streaming": True}, None, {"max_steps": 7, "max_steps_per_epoch": 3}, "max_steps_per_epoch=3 says nothing"),
        (
            {"streaming": True, "shuffle_buffer": 5},
            None,
            {"max_steps": 7, "shuffle": False},
            r"dataset\.shuffle_buffer=5 mixes rows, and shuffle=false",
        ),
        ({}, {"source": "nowhere.jsonl"}, {}, r"dataset_val\.source=nowhere\.jsonl: no file or folder"),
        ({}, {"source": None}, {}, r"dataset_val has no rows: give dataset_val\.source="),
        ({}, {"separator": "a"}, {}, r"dataset_val\.separator='a' is for text files"),
        ({}, {"split": "[1"}, {}, r"dataset_val\.split=\[1 is not understood"),
        ({}, {"name": "main"}, {}, r"dataset_val\.name=main is the subset of a hub data set"),
        ({}, {"cache_dir": __file__}, {}, r"dataset_val\.cache_dir=.*test_run\.py is a file"),
        ({}, {"document_end_id": 3}, {}, r"dataset_val\.document_end_id is for dataset_val\.format=tokens"),
        ({}, {"column_map": {"x": "y"}}, {}, r"dataset_val\.column_map has 'x', which dataset_val\.format=text"),
    ],
)
def test_refused_before_a_row_is_tokenised(
    dataset: dict[str, Any],
    dataset_val: dict[str, Any] | None,
    settings: dict[str, Any],
    message: str,
    tokenizer: tokenizers.Tokenizer,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RowEncoder, "__call__", None)
    common = {"source": source, "format": "text"}
    cfg_val = None if dataset_val is None else DatasetConfig(**{**common, **dataset_val})
    with pytest.raises((ValueError, OSError), match=message):
        load(tokenizer, DatasetConfig(**{**common, **dataset}), cfg_val, **settings)


@pytest.mark.parametrize(
    ("sources", "is_val", "settings", "message"),
    [
        ([{"weight": 1.0}, {}], False, {}, r"dataset\.sources\.b has no weight, and others have one"),
        ([{"weight": 1.0}, {}], True, {}, r"dataset_val\.sources\.a\.weight=1\.0 says nothing for validation"),
        ([{}, {"weight": 1.0}], True, {}, r"dataset_val\.sources\.b\.weight=1\.0 says nothing for validation"),
        ([{}, {}], False, {"max_steps_per_epoch": 2}, "max_steps_per_epoch=2 would leave out"),
        (
            [{}, {"source": "nowhere.jsonl"}],
            False,
            {},
            r"dataset\.sources\.b\.source=nowhere\.jsonl: no file or folder",
        ),
        ([{}, {"source": "nowhere.jsonl"}], True, {}, r"dataset_val\.sources\.b\.source=nowhere\.jsonl: no file"),
        (
            [{}, {"join_documents": True}],
            False,
            {},
            r"dataset\.packed=true .* dataset\.sources\.b\.join_documents=true",
        ),
    ],
)
def test_a_blend_is_refused_before_a_row_is_tokenised(
    sources: list[dict[str, Any]],
    is_val: bool,
    settings: dict[str, Any],
    message: str,
    tokenizer: tokenizers.Tokenizer,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RowEncoder, "__call__", None)
    plain, several = DatasetConfig(source=source, format="text"), blend(source, *sources, packed=True)
    with pytest.raises((ValueError, OSError), match=message):
        load(tokenizer, plain if is_val else several, several if is_val else None, **settings)


@pytest.mark.parametrize("how", [{}, {"packed": True}, {"group_by_length": False}])
def test_validation_keeps_no_batches(
    how: dict[str, Any], tokenizer: tokenizers.Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = DatasetConfig(source=source, format="text", **how)
    (batches,) = load(tokenizer, cfg, cfg).val_batches.values()
    once, again = list(batches), list(batches)
    assert len(once) == len(batches)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(once, again, strict=True))
    assert not {id(one) for one in once} & {id(other) for other in again}
    monkeypatch.setattr("kdtune.data.loader._collate", None)
    assert batches.num_labels == sum(int((batch.labels != data.IGNORE).sum()) for batch in once)


def test_a_line_break_that_a_shell_did_not_make(tokenizer: tokenizers.Tokenizer, source: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    with pytest.warns(UserWarning, match=r"dataset\.separator has a backslash .*'dataset\.separator=\"\.\.\.\\n"):
        load(tokenizer, DatasetConfig(source=str(tmp_path / "a.txt"), format="text", separator="\\n"))
    (tmp_path / "b.jsonl").write_text('{"q": "a", "output": "b"}')
    template = "{q}\\nAnswer:"
    with pytest.warns(UserWarning, match=r"dataset_val\.prompt_template has a backslash and an n"):
        load(
            tokenizer,
            DatasetConfig(source=source, format="text"),
            DatasetConfig(source=str(tmp_path / "b.jsonl"), prompt_template=template),
        )


@pytest.mark.parametrize(
    ("rows", "on_error", "message"),
    [
        (["broken"], "skip", r"^dataset: the 1 row of .* was skipped: .*, line 1, column 1: broken json"),
        (["broken"] * 3, "skip", r"^dataset: the 3 rows of .* were all skipped, the first: .*, line 1, column 1"),
        (
            ["broken", '{"text": ""}', '{"text": ""}'],
            "skip",
            r"the 3 rows of .* have nothing to train on: 1 is skipped \(the first: .*\); 2 are without anything to "
            r"predict\.",
        ),
        (['{"text": ""}'], "raise", r"the 1 row of .* has nothing to train on: 1 is without anything to predict"),
        ([json.dumps({"text": "fox " * 99})], "drop", r"1 is longer than tokenizer\.max_seq_len=64 and dropped\."),
    ],
)
def test_nothing_to_train_on(
    rows: list[str], on_error: Any, message: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    how = {"too_long": "drop"} if on_error == "drop" else {"on_error": on_error}
    with pytest.raises(ValueError, match=message):
        load(tokenizer, DatasetConfig(source=str(tmp_path / "rows.jsonl"), format="text", **how))
