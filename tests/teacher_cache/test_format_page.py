"""The reader on docs/teacher_cache_format.md, which a stranger would write, reads what kdtune reads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_answers
import numpy as np
import pytest

from kdtune.teacher_cache import Card, Hidden, Samples, StoreConfig, Teacher, TeacherCache, TopK, Writer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "teacher_cache_format.md"
VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def make(store: StoreConfig, seed: int) -> TopK | Samples | Hidden:
    if store.kind == "hidden":
        return Hidden(np.random.default_rng(seed).normal(size=(5, 8)).astype(np.float32), "fp32")
    if store.kind == "samples":
        return made_answers.samples(seed, 6, store.num_samples, VOCAB_SIZE, store.sampling_power)
    return made_answers.top_k(seed, 6, store.top_k, VOCAB_SIZE, store.top_p)


@pytest.mark.parametrize(
    "store",
    [
        StoreConfig("top_k"),
        StoreConfig("top_k", top_p=0.9, bits=16),
        StoreConfig("top_k", top_k=VOCAB_SIZE),
        StoreConfig("top_k", top_k=9, bits=32),
        StoreConfig("samples", num_samples=12),
        StoreConfig(kind="samples", num_samples=400, sampling_power=0.6, bits=16),
        StoreConfig(kind="hidden", hidden_dtype="fp32"),
    ],
    ids=lambda store: f"{store.kind} {store.top_k} {store.bits}",
)
def test_reader_of_the_page(tmp_path: Path, reader: dict[str, Any], store: StoreConfig) -> None:
    card = Card(store, VOCAB_SIZE, Teacher("tiny", "0123", "fp32"), "4567")
    if store.kind == "hidden":
        card = replace(card, hidden={"size": 8})
    with Writer(tmp_path, card, shard_bytes=1) as writer:
        for example_id in range(3):
            writer.add(example_id, make(store, example_id))
    cache = TeacherCache(tmp_path)
    for example_id in range(3):
        found, expected = reader["read"](tmp_path, example_id), cache.read(example_id)
        if isinstance(expected, TopK | Samples):
            order = np.where(expected.ids < 0, VOCAB_SIZE, expected.ids).argsort(1)
            values = "log_probs" if isinstance(expected, TopK) else "weights"
            columns = {name: np.take_along_axis(getattr(expected, name), order, 1) for name in ("ids", values)}
            sizes = (expected.ids >= 0).sum(1).tolist()
            for name, column in columns.items():
                for row, ours, size in zip(found.pop(name), column, sizes, strict=True):
                    np.testing.assert_allclose(row, ours[:size], rtol=1e-5, atol=1e-6)
        for name, column in found.items():
            np.testing.assert_allclose(column, getattr(expected, name), rtol=1e-5, atol=1e-6)
