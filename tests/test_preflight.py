"""What is refused before a weight is read: each with its numbers and what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs

from kdtune import preflight, tokenizers
from kdtune.models import ModelConfig
from kdtune.tokenizers import Tokenizer

SIZE = 2048  # of the tokenizer


def model(vocab_size: int = SIZE, max_seq_len: int = 128) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_seq_len=max_seq_len,
        windows=(None,),
    )


def make_tokenizer(folder: Path, change: Any = None) -> Tokenizer:
    """That of the quickstart, after `change(vocab)`."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_runs.TEACHER_ASSETS / name, folder / name)
    content = json.loads((folder / "tokenizer.json").read_text())
    if change is not None:
        change(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return tokenizers.load(folder)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "student")


def test_sequence_length() -> None:
    preflight.check_sequence_length(128, "tokenizer.max_seq_len", model(), "teacher")
    with pytest.raises(ValueError, match=r"tokenizer.max_seq_len is 129, and the teacher was built for 128 positions"):
        preflight.check_sequence_length(129, "tokenizer.max_seq_len", model(), "teacher")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], r"sample_prompts: prompt 2 is empty"),
        ([[1, SIZE]], r"prompt 1 has the id 2048, and the teacher's embedding has 2048 rows"),
        ([[1] * 65], r"prompt 1 with 64 new tokens is 129, and the teacher was built for 128"),
    ],
)
def test_prompts(prompts: list[list[int]], message: str) -> None:
    preflight.check_prompts([[1] * 64], 64, "sample_prompts", model(), "teacher")
    with pytest.raises(ValueError, match=message):
        preflight.check_prompts(prompts, 64, "sample_prompts", model(), "teacher")


def test_vocabulary(tokenizer: Tokenizer) -> None:
    preflight.check_vocabulary(tokenizer, SIZE, "student")
    preflight.check_vocabulary(tokenizer, SIZE + 64, "student")
    with pytest.raises(ValueError, match=r"has 2048 ids, the student's embedding 2047 rows"):
        preflight.check_vocabulary(tokenizer, SIZE - 1, "student")


@pytest.mark.parametrize(("student", "teacher"), [(0, 0), (0, 64), (128, 0), (8, 16)])
def test_pairs_that_differ_by_padding_fit(student: int, teacher: int, tokenizer: Tokenizer) -> None:
    preflight.check_pair(tokenizer, tokenizer, SIZE + student, SIZE + teacher)


def test_further_ids_of_one_side_are_padding_for_the_other(tokenizer: Tokenizer, tmp_path: Path) -> None:
    longer = make_tokenizer(tmp_path / "teacher", lambda vocab: vocab.update(zzzz=SIZE))
    preflight.check_pair(tokenizer, longer, SIZE, SIZE + 1)


def test_swapped_tokens_do_not_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def swap(vocab: dict[str, int]) -> None:
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    other = make_tokenizer(tmp_path / "teacher", swap)
    first = min(id for id in other.ids() if other.piece(id) in "ab")
    with pytest.raises(
        ValueError, match=rf"\(vocabulary 2048\) and teacher \(2112\).* id {first} is '[ab]' in .*one fam"
    ):
        preflight.check_pair(tokenizer, other, SIZE, SIZE + 64)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_vocabulary_smaller_than_the_tokenizer_does_not_fit(role: str, tokenizer: Tokenizer) -> None:
    sizes = {"student": SIZE, "teacher": SIZE, role: SIZE - 8}
    with pytest.raises(ValueError, match=f"2048 ids, the {role}'s embedding 2040 rows"):
        preflight.check_pair(tokenizer, tokenizer, sizes["student"], sizes["teacher"])


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=3 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = tmp_path / "not" / "yet"
    preflight.check_disk_space(folder, 3 * 2**30)
    assert asked == [tmp_path], "the nearest folder that exists"
    with pytest.raises(ValueError, match=r"will need 4\.0 GiB .* its disk has 3\.0 GiB free.*save_every_n_steps=0"):
        preflight.check_disk_space(folder, 4 * 2**30)


def test_disk_space_of_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preflight.check_disk_space(Path("runs/new"), 1)
    with pytest.raises(ValueError, match="output_dir runs/new will need"):
        preflight.check_disk_space(Path("runs/new"), 2**62)


def test_describe() -> None:
    text = preflight.describe("models/tiny", model(2_000_000))
    assert text == "models/tiny: 32.0 M parameters, 1 layers of 8, vocabulary 2,000,000"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_disk_space(tmp_path / "new", 1)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # what root may do says nothing here
    with pytest.raises(PermissionError, match="not writable for you"):
        preflight.check_disk_space(tmp_path / "new", 1)
