"""Files of other tools, made as they make them, become the cache that the teacher itself would have filled."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

from kdtune.data.examples import Examples
from kdtune.teacher_cache import StoreConfig, TeacherCache, TopK
from kdtune.teacher_cache.convert import from_axolotl, from_nemo_aligner

K, VOCAB = 8, 2048
Row = dict[str, Any]


class Text:
    """Rows of tokens of which some are to be predicted, and what a teacher that mostly knows them expects."""

    def __init__(self, num_rows: int = 12, known: float = 4.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = [torch.randint(VOCAB, (9 + 3 * i,), generator=generator).tolist() for i in range(num_rows)]
        self.is_label = [[False, *(i % 4 > 0 for i in range(1, len(row)))] for row in self.tokens]
        self.logits = []  # of each row [n, v]: at place i of token i + 1
        for row in self.tokens:
            logits = torch.randn(len(row), VOCAB, generator=generator)
            logits[torch.arange(len(row) - 1), torch.tensor(row[1:])] += known
            self.logits.append(logits)

    def examples(self) -> Examples:
        rows = zip(self.tokens, self.is_label, strict=True)
        return Examples.of("rows", 512, [[(np.array(tokens), np.array(flags))] for tokens, flags in rows])

    def nemo_aligner(self) -> list[Row]:
        rows = []
        for tokens, is_label, logits in zip(self.tokens, self.is_label, self.logits, strict=True):
            top = logits[:-1].topk(K)
            padding = [0, 0]  # a batch is as long as its longest row
            rows.append(
                {
                    "tokens": tokens[:-1] + padding,
                    "labels": tokens[1:] + padding,
                    "loss_mask": [float(flag) for flag in is_label[1:]] + [0.0, 0.0],
                    "topk_logits": top.values.tolist() + [[1.0] * K] * 2,
                    "topk_token_ids": top.indices.tolist() + [list(range(K))] * 2,
                    "log_sum_exp_logits": [*logits[:-1].logsumexp(-1).tolist(), 9.0, 9.0],
                    "index": len(rows),
                }
            )
        return rows

    def axolotl(self, form: str) -> list[Row]:
        rows = []
        for tokens, is_label, logits in zip(self.tokens, self.is_label, self.logits, strict=True):
            top = logits[:-1].log_softmax(-1).topk(K)  # of the tokens from the second on
            row: Row = {
                "input_ids": tokens,
                "labels": [token if flag else -100 for token, flag in zip(tokens, is_label, strict=True)],
            }
            if form == "vllm":
                row["logprobs"] = [
                    [{"token": f"token_id:{id}", "logprob": value} for id, value in zip(ids, values, strict=True)]
                    for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
            else:  # prepared ones are filled up on the left
                row["target_logprobs"] = [[-math.inf] * K, *top.values.tolist()]
                row["target_token_ids"] = [list(range(K)), *top.indices.tolist()]
            rows.append(row)
        return rows


def write(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def settings(store: StoreConfig | None = None) -> Row:
    store = store or StoreConfig("top_k", bits=32, top_k=K)
    return {"teacher": "T", "tokenizer": tiny_runs.TEACHER_ASSETS, "vocab_size": VOCAB, "store": store}


FORMS: dict[str, tuple[Callable[..., TeacherCache], Callable[[Text], list[Row]]]] = {
    "nemo_aligner": (from_nemo_aligner, Text.nemo_aligner),
    "axolotl": (from_axolotl, lambda text: text.axolotl("vllm")),
    "prepared": (from_axolotl, lambda text: text.axolotl("prepared")),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_cache_has_what_the_teacher_said(form: str, tmp_path: Path) -> None:
    convert, rows_of = FORMS[form]
    text = Text()
    rows = rows_of(text)
    files = [write(tmp_path / "one.jsonl", rows[:5]), write(tmp_path / "two.jsonl.gz", rows[5:])]
    cache = convert(files, tmp_path / "cache", **settings())
    examples = text.examples()
    assert sorted(cache.ids.tolist()) == sorted(examples.ids.tolist()), "so that the data's examples are found"
    assert cache.card.entropy_of == "bucket"
    assert (tmp_path / "cache" / "tokenizer" / "tokenizer.json").is_file()
    for example, tokens, is_label, logits in zip(
        examples.ids.tolist(), text.tokens, text.is_label, text.logits, strict=True
    ):
        answers = cache.read(example)
        assert isinstance(answers, TopK)
        places = np.flatnonzero(is_label)
        log_p = logits.double().log_softmax(-1).numpy()[places - 1]
        np.testing.assert_allclose(answers.log_probs, np.take_along_axis(log_p, answers.ids, 1), atol=1e-5)
        assert answers.top_ids.tolist() == log_p.argmax(1).tolist()
        mass = np.sort(np.exp(log_p))[:, -K:].sum(1)
        np.testing.assert_allclose(np.exp(answers.log_rest), 1 - mass, atol=1e-5)
        labels = np.array(tokens)[places]
        is_kept = (answers.ids == labels[:, None]).any(1)
        expected = np.where(is_kept, log_p[np.arange(len(labels)), labels], answers.log_rest)
        np.testing.assert_allclose(answers.label_log_probs, expected, atol=1e-5)


def test_fewer_are_kept_if_wanted_and_more_files_added(tmp_path: Path) -> None:
    rows = Text().nemo_aligner()
    few = settings(StoreConfig("top_k", top_k=3))
    from_nemo_aligner([write(tmp_path / "one.jsonl", rows[:5])], tmp_path / "cache", **few)
    cache = from_nemo_aligner([write(tmp_path / "two.jsonl", rows)], tmp_path / "cache", **few)
    assert len(cache) == len(rows)
    assert all(cache.read(example).ids.shape[1] == 3 for example in cache.ids.tolist())  # type: ignore[union-attr]


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("form", FORMS)
def test_lists_that_are_shifted_by_one(form: str, shift: int, tmp_path: Path) -> None:
    convert, rows_of = FORMS[form]
    text = Text(known=12.0)
    rows = rows_of(text)
    for row in rows:
        for name in {"topk_logits", "topk_token_ids", "log_sum_exp_logits", "target_logprobs", "target_token_ids"} & {
            *row
        }:
            row[name] = np.roll(np.array(row[name]), shift, axis=0).tolist()
        if "logprobs" in row:
            row["logprobs"] = [*row["logprobs"][-shift:], *row["logprobs"][:-shift]]
    with pytest.raises(ValueError, match=r"shifted by one: of the first \d+ places|no log-prob|nothing is said"):
        convert([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache", **settings())
    assert len(TeacherCache(tmp_path / "cache")) == 0
    convert([write(tmp_path / "rows.jsonl", rows_of(text))], tmp_path / "cache", **settings())


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("nemo_aligner", {"labels": [5] * 10}, "line 2, cannot be used: its labels are not its tokens, one place on"),
        ("nemo_aligner", {"topk_logits": None}, "line 2, cannot be used: TypeError"),
        ("nemo_aligner", {"log_sum_exp_logits": [-5.0] * 14}, "are no log-probabilities"),
        ("nemo_aligner", {"topk_token_ids": [[VOCAB, *range(K - 1)]] * 14}, "token 2048 is none of the 2,048"),
        ("axolotl", {"logprobs": [[]] * 12}, "nothing is said about its token 1, which has a label"),
        ("axolotl", {"logprobs": [[]] * 99}, "it has 12 tokens, and likely ones for 99"),
        ("axolotl", {"labels": [7] * 12}, "its labels are not its tokens, place by place"),
        ("axolotl", {"labels": None}, "line 2, cannot be used: TypeError"),
    ],
)
def test_rows_that_are_refused(form: str, change: Row, message: str, tmp_path: Path) -> None:
    convert, rows_of = FORMS[form]
    rows = rows_of(Text(3))
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        convert([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache", **settings())


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="such files tell the likeliest tokens alone"):
        from_axolotl([], tmp_path / "cache", **settings(StoreConfig("samples", num_samples=12)))
    broken = tmp_path / "rows.jsonl"
    broken.write_text("{}\n{half")
    with pytest.raises(ValueError, match=r"line 1, cannot be used: KeyError: 'loss_mask'"):
        from_nemo_aligner([broken], tmp_path / "cache", **settings())
    broken.write_text("{half")
    with pytest.raises(ValueError, match="line 1, is no JSON"):
        from_nemo_aligner([broken], tmp_path / "cache", **settings())
