"""Packing: every document once, no row too full, as first-fit decreasing would have it, and nearly no padding."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kdtune
from kdtune import data, tokenizers
from kdtune.data import IGNORE
from kdtune.data.packing import WINDOW, RowPlan, pack

ASSETS = Path(kdtune.__file__).parent / "assets" / "quickstart"


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """As the textbook has it."""
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= capacity:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def as_lists(rows: RowPlan) -> list[list[int]]:
    return [rows[i].tolist() for i in range(len(rows))]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_first_fit_decreasing_within_each_window(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity, window = int(generator.integers(1, 50)), int(generator.integers(1, 40))
    lengths = generator.integers(1, capacity + 1, int(generator.integers(0, 90)))
    expected = []
    for start in range(0, len(lengths), window):
        rows = first_fit_decreasing(lengths[start : start + window], capacity)
        rows.sort(key=lambda row: row[0])  # the first that a row took is its longest
        expected += [sorted(start + i for i in row) for row in rows]
    assert as_lists(pack(lengths, capacity, window)) == expected


def chat_lengths(count: int) -> np.ndarray:
    """Skewed as chats are: half below 500 tokens, one in twenty cut at 2,048."""
    lengths = np.random.default_rng(0).lognormal(6.2, 0.9, count)
    return np.clip(lengths, 20, 2048).astype(np.int64)


def gsm8k_lengths() -> np.ndarray:
    """Characters of the quickstart's rows, of which a token has about three and a half."""
    with gzip.open(ASSETS / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    return np.array([len(row["question"]) + len(row["answer"]) for row in rows]) * 2 // 7 + 6


@pytest.mark.parametrize("lengths", [gsm8k_lengths(), chat_lengths(5000)], ids=["gsm8k", "chats"])
def test_rows_of_2048_are_98_percent_filled(lengths: np.ndarray) -> None:
    order = np.random.default_rng(1).permutation(len(lengths))
    rows = pack(lengths[order], 2048)
    filled = rows.lengths(lengths[order])
    assert filled.sum() == lengths.sum()
    assert filled.max() <= 2048
    assert filled.mean() / 2048 > 0.98


def test_rows_are_not_in_the_order_of_lengths() -> None:
    lengths = chat_lengths(5000)
    rows = pack(lengths, 2048)
    place = np.arange(len(rows))
    longest = np.maximum.reduceat(lengths[rows.indices], rows.starts[:-1])
    for quantity in (longest, np.diff(rows.starts), rows.lengths(lengths)):
        assert abs(np.corrcoef(place, quantity)[0, 1]) < 0.06


def test_documents_stay_in_their_window() -> None:
    rows = pack(chat_lengths(100), 2048, window=20)
    assert {len({i // 20 for i in row}) for row in as_lists(rows)} == {1}
    starts = [row[0] // 20 for row in as_lists(rows)]
    assert starts == sorted(starts)
    assert sorted(rows.indices) == list(range(100))


def test_a_hundred_thousand_are_packed_at_once() -> None:
    lengths = np.tile(chat_lengths(5000), 20)
    rows = pack(lengths, 2048)
    assert np.array_equal(np.sort(rows.indices), np.arange(len(lengths)))
    assert rows.indices.nbytes + rows.starts.nbytes < 20 * len(lengths), "bytes of a document in the plan"
    assert len(lengths) > 2 * WINDOW
    assert rows.lengths(lengths).mean() / 2048 > 0.995


@pytest.mark.parametrize("wrong", [0, 11])
def test_a_document_that_no_row_can_hold_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"example 2 has {wrong} positions, and rows have 1 to 10"):
        pack(np.array([3, 10, wrong]), 10)


# Batches of packed rows.


@pytest.fixture(scope="module")
def examples() -> data.Examples:
    cfg = data.DatasetConfig(
        source=str(ASSETS / "validation.jsonl.gz"),
        split="[:40]",
        column_map={"output": "answer"},
        prompt_template="Question: {question}\nAnswer:\n",
        packed=True,
    )
    return data.load(cfg, tokenizers.load(ASSETS / "teacher"), 512)


def test_every_document_is_in_the_batch_as_it_is_alone(examples: data.Examples) -> None:
    chosen = [[3, 1, 4], [15, 9], [2]]
    batch = data.collate_packed([[examples[i] for i in row] for row in chosen], 7)
    assert batch.documents is not None
    length = max(int(examples.lengths[row].sum()) for row in chosen)
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (3, length)
    assert batch.documents.rows == [examples.lengths[row].tolist() for row in chosen]
    assert batch.documents.row_length == length
    for b, row in enumerate(chosen):
        start = 0
        for i in row:
            tokens, labels = examples[i]
            place = slice(start, start := start + len(tokens))
            assert torch.equal(batch.tokens[b, place], tokens)
            assert torch.equal(batch.labels[b, place], labels)
            assert batch.positions[b, place].tolist() == list(range(len(tokens)))
        assert (batch.tokens[b, start:] == 7).all()
        assert (batch.labels[b, start:] == IGNORE).all()


def test_labels_never_cross_a_border(examples: data.Examples) -> None:
    """A label is the next token of its own document; that of a document's last token is its own end, or nothing."""
    batch = next(iter(data.ValBatches(examples, 4, packed=True)))
    assert batch.documents is not None
    scored = batch.labels[:, :-1] != IGNORE
    inside = batch.positions[:, 1:] > 0
    assert torch.equal(batch.labels[:, :-1][scored & inside], batch.tokens[:, 1:][scored & inside])
    at_border = batch.labels[:, :-1][scored & ~inside]
    end = examples[0][1][-1]
    assert len(at_border) > 4
    assert (at_border == end).all(), "no first token of a neighbour"


def test_validation_rows_are_packed_too(examples: data.Examples) -> None:
    packed, grouped, in_order = (
        data.ValBatches(examples, 4, packed=packed, group_by_length=group)
        for packed, group in ((True, None), (False, None), (False, False))
    )
    for batches in (packed, grouped, in_order):
        assert batches.num_labels == data.count_labels(list(batches)) == examples.num_labels
        assert len(batches) == len(list(batches))
    computed = [sum(batch.tokens.numel() for batch in batches) for batches in (packed, grouped, in_order)]
    assert max(computed[:2]) < 0.9 * computed[2]
    assert next(iter(in_order)).tokens[0, : examples.lengths[0]].tolist() == examples[0][0].tolist()
    with pytest.raises(ValueError, match=r"dataset\.group_by_length=true is for rows of one document"):
        data.ValBatches(examples, 4, packed=True, group_by_length=True)
