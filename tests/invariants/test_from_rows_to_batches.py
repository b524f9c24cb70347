"""Every answer of a data set is in its batches once, letter for letter, and nothing else has a label."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdtune
from kdtune import data, tokenizers
from kdtune.data import IGNORE, Batch, DatasetConfig, Examples

ASSETS = Path(kdtune.__file__).parent / "assets" / "quickstart"
MAX_SEQ_LEN = 1024
EOS = "<eos>"
# Calls of tools are what the model says, what tools answer is not.
WITH_TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}({{ call.function.name }} "
    "{{ call.function.arguments | tojson }}){% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}<{{ message.role }}>{{ message.content }}</>{% endif %}{% endfor %}"
)
CALL = {"function": {"name": "add", "arguments": '{"a": 48, "b": 24}'}}

Row = dict[str, Any]
Answers = list[list[str]]  # of each example: what has a label, piece by piece


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.load(ASSETS / "teacher")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with gzip.open(ASSETS / "validation.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file][:100]


def instruct(rows: list[Row], folder: Path) -> tuple[dict[str, Any], list[Row], Answers]:
    settings = {"prompt_template": "Question: {question}\nAnswer:\n", "column_map": {"output": "answer"}}
    return settings, rows, [[row["answer"] + EOS] for row in rows]


def completion(rows: list[Row], folder: Path) -> tuple[dict[str, Any], list[Row], Answers]:
    settings = {"format": "completion", "column_map": {"prompt": "question", "completion": "answer"}}
    return settings, rows, [[row["answer"] + EOS] for row in rows]


def chat(rows: list[Row], folder: Path) -> tuple[dict[str, Any], list[Row], Answers]:
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    names = (("human", "question"), ("gpt", "answer"))
    found = [
        {"conversations": [{"from": name, "value": row[key]} for row in two for name, key in names]} for two in pairs
    ]
    answers = [[f" {row['answer']} {EOS}" for row in two] for two in pairs]
    return {"format": "chat", "chat_template": "llama2"}, found, answers


def tools(rows: list[Row], folder: Path) -> tuple[dict[str, Any], list[Row], Answers]:
    template = folder / "tools.jinja"
    template.write_text(WITH_TOOLS)
    found = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "72"},
                {"role": "assistant", "content": row["answer"]},
            ],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        }
        for row in rows
    ]
    answers = [['(add {"a": 48, "b": 24})' + EOS, row["answer"] + EOS] for row in rows]
    return {"format": "chat", "chat_template": str(template)}, found, answers


def text(rows: list[Row], folder: Path) -> tuple[dict[str, Any], list[Row], Answers]:
    found = [{"text": f"{row['question']}\n{row['answer']}"} for row in rows]
    return {"format": "text"}, found, [[row["text"] + EOS] for row in found]


def tokens(rows: list[Row], folder: Path) -> tuple[dict[str, Any], list[Row], Answers]:
    tokenizer = tokenizers.load(ASSETS / "teacher")
    found, answers = [], []
    for row in rows:
        question, answer = tokenizer.encode(row["question"]), tokenizer.encode(row["answer"], continues=True)
        found.append({"input_ids": [*question, *answer], "mask": [0] * len(question) + [1] * len(answer)})
        answers.append([row["answer"]])
    return {"format": "tokens"}, found, answers


FORMATS = (instruct, completion, chat, tools, text, tokens)


@pytest.fixture(scope="module", params=FORMATS, ids=lambda make: make.__name__)
def loaded(
    request: pytest.FixtureRequest,
    rows: list[Row],
    tokenizer: tokenizers.Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Examples, Answers]:
    make: Callable[..., tuple[dict[str, Any], list[Row], Answers]] = request.param
    folder = tmp_path_factory.mktemp("rows")
    settings, found, answers = make(rows, folder)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    examples = data.load(DatasetConfig(source=str(path), **settings), tokenizer, MAX_SEQ_LEN)
    assert isinstance(examples, Examples)
    assert len(examples) == len(answers)
    assert examples.lengths.max() < MAX_SEQ_LEN, "none is cut"
    return examples, answers


def spell(ids: list[int], tokenizer: tokenizers.Tokenizer) -> str:
    pieces = b"".join(EOS.encode() if id == tokenizer.eos_id else tokenizer.piece_bytes(id) for id in ids)
    return pieces.decode()


def spans(labels: torch.Tensor) -> list[list[int]]:
    """Labels that are beside each other."""
    cuts = (torch.diff((labels != IGNORE).int(), prepend=torch.tensor([0]), append=torch.tensor([0])) != 0).nonzero()
    return [labels[start:end].tolist() for start, end in cuts.view(-1, 2).tolist()]


def documents(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of each; a row that is not packed ends with its last label."""
    for i, labels in enumerate(batch.labels):
        ends = [int((labels != IGNORE).nonzero().max()) + 1] if batch.documents is None else batch.documents.rows[i]
        for start, end in pairwise([0, *np.cumsum(ends).tolist()]):
            assert batch.positions[i, start:end].tolist() == list(range(end - start))
            yield batch.tokens[i, start:end], labels[start:end]
        assert (labels[sum(ends) :] == IGNORE).all(), "padding has none"


def test_labels_are_the_answers(loaded: tuple[Examples, Answers], tokenizer: tokenizers.Tokenizer) -> None:
    examples, answers = loaded
    for (ids, labels), expected in zip(examples, answers, strict=True):
        assert [spell(span, tokenizer) for span in spans(labels)] == expected
        following, scored = labels[:-1], labels[:-1] != IGNORE
        assert torch.equal(following[scored], ids[1:][scored])


@pytest.mark.parametrize("how", [{"packed": True}, {"group_by_length": True}, {"shuffle": False}], ids=str)
def test_an_epoch_has_each_answer_once(loaded: tuple[Examples, Answers], how: dict[str, bool]) -> None:
    examples, _ = loaded
    expected = Counter((tuple(ids.tolist()), tuple(labels.tolist())) for ids, labels in examples)
    found = Counter[Any]()
    loader = data.Loader(examples, batch_size=3, gradient_accumulation_steps=2, **how)
    num_labels = 0
    while loader.epoch == 0:
        for batch in (micro_batches := loader.next_step()):
            found.update((tuple(ids.tolist()), tuple(labels.tolist())) for ids, labels in documents(batch))
        num_labels += data.count_labels(micro_batches)
    assert found == expected
    assert num_labels == examples.num_labels
