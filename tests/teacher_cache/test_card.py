"""The card: what keeps answers of different teachers, tokenizers and kinds apart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdtune.teacher_cache import Card, Dataset, StoreConfig, Teacher, teacher_fingerprint

CARD = Card(
    StoreConfig("top_k", top_k=5, top_p=0.9),
    97,
    Teacher("tiny", "0123", "fp32", quantization="int4"),
    "4567",
    datasets=(Dataset({"source": "rows.jsonl", "column_map": {"output": "answer"}}, 384, 12),),
)


def test_a_card_is_read_as_it_was_written() -> None:
    assert Card.from_json(CARD.to_json()) == CARD
    hidden = replace(CARD, store=StoreConfig(kind="hidden"), hidden={"size": 8})
    assert Card.from_json(hidden.to_json()) == hidden


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"store": StoreConfig("top_k", top_k=6, top_p=0.9)}, ["store.top_k is 5 in the cache and 6 here"]),
        ({"vocab_size": 98}, ["vocab_size is 97 in the cache and 98 here"]),
        ({"teacher": Teacher("other", "0123", "bf16")}, ["teacher.dtype", "teacher.quantization is int4"]),
        ({"teacher": Teacher("tiny", "89ab", "fp32", "int4")}, ["teacher.fingerprint is 0123 in the cache and 89ab"]),
        ({"tokenizer": "x"}, ["tokenizer is 4567"]),
        ({"hidden": {"size": 8}}, ["hidden.size is None in the cache and 8 here"]),
        ({"entropy_of": "bucket"}, ["entropy_of is whole"]),
        ({"teacher": Teacher("moved/tiny", "0123", "fp32", "int4")}, []),
        ({"datasets": ()}, []),
        ({"kdtune": "0"}, []),
    ],
)
def test_differences_in_words(change: dict[str, Any], told: list[str]) -> None:
    other = replace(CARD, **change)
    differences = CARD.differences(other)
    assert len(differences) == len(told)
    for difference, words in zip(differences, told, strict=True):
        assert words in difference
    assert (CARD.hash == other.hash) == (not told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no card"),
        ("[]", "no card"),
        ("{}", "no card"),
        ('{"format": "kdtune teacher cache", "version": 2}', "is of kdtune teacher cache 2, and this kdtune reads"),
        ('{"format": "kdtune teacher cache", "version": 1}', "lacks an entry"),
    ],
)
def test_something_else_is_no_card(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Card.from_json(text)


@pytest.mark.parametrize("change", [{"vocab_size": 98}, {"more": 1}, {"entropy_of": "half"}])
def test_a_changed_card_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"changed by hand|one too many"):
        Card.from_json(json.dumps({**json.loads(CARD.to_json()), **change}))


def test_data_sets_are_added_once() -> None:
    new = Dataset({"source": "more.jsonl"}, 384, 3)
    both = CARD.with_datasets((new, *CARD.datasets))
    assert both.datasets == (*CARD.datasets, new)
    assert both.with_datasets((new,)) == both


def test_fingerprint_of_a_teacher_is_of_its_content(tmp_path: Path) -> None:
    folder, copy = tmp_path / "teacher", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = bytearray(range(256)) * 1000
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "generation_config.json").write_text("{}")
    fingerprint = teacher_fingerprint(folder)
    shutil.copytree(folder, copy)
    assert teacher_fingerprint(copy) == fingerprint
    (copy / "README.md").write_text("new")
    (copy / "generation_config.json").write_text("new")
    assert teacher_fingerprint(copy) == fingerprint
    for place in (5, len(weights) - 5):
        changed = weights.copy()
        changed[place] ^= 1
        (copy / "model.safetensors").write_bytes(changed)
        assert teacher_fingerprint(copy) != fingerprint
    (copy / "model.safetensors").write_bytes(weights)
    assert teacher_fingerprint(copy) == fingerprint
    for name in ("config.json", "adapter_config.json", "model-00002-of-00002.safetensors"):
        changed_copy = tmp_path / name
        shutil.copytree(copy, changed_copy)
        (changed_copy / name).write_text("{ }")
        assert teacher_fingerprint(changed_copy) != fingerprint


def test_fingerprint_of_a_teacher_with_an_adapter(tmp_path: Path) -> None:
    folder, adapter = tmp_path / "teacher", tmp_path / "adapter"
    for one in (folder, adapter):
        one.mkdir()
    (folder / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text("{}")
    with_adapter = teacher_fingerprint(folder, adapter)
    assert with_adapter != teacher_fingerprint(folder)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    assert teacher_fingerprint(folder, adapter) != with_adapter
