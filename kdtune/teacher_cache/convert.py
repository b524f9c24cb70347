"""Answers that other tools have written, as a cache: one function for each tool's rows, JSON lines or gzipped ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdtune import checkpoint, tokenizers
from kdtune.data.ids import example_ids
from kdtune.teacher_cache.card import Card, Teacher
from kdtune.teacher_cache.config import StoreConfig
from kdtune.teacher_cache.likeliest import Entries, check_kind, keep_likeliest
from kdtune.teacher_cache.store import TeacherCache, Writer, write_tokenizer

_ENOUGH = 200  # labelled tokens that tell whether likely tokens are those of their place


class _Example(NamedTuple):
    tokens: Sequence[int]
    is_label: Sequence[bool]  # of each token; the first is never one
    entries: Sequence[Entries | None]  # what was likely in the place of each token; None: not known


def from_nemo_aligner(
    files: Sequence[str | Path],
    folder: str | Path,
    *,
    teacher: str,
    tokenizer: str | Path,
    vocab_size: int,
    store: StoreConfig | None = None,
) -> TeacherCache:
    """What `compute_topk_logits.py` of NeMo-Aligner wrote: the k largest logits at each position.

    A row has `tokens`, `labels`, `loss_mask`, `log_sum_exp_logits` [s], and `topk_logits`, `topk_token_ids` [s, k].
    NeMo-Aligner compares the k alone; `kd_loss.top_k_convention=renormalised` does so here, too.

    Args:
        files: of JSON lines.
        folder: of the cache, new or one of the same teacher.
        teacher: which model it was, for people, and to tell it from others.
        tokenizer: folder of the tokenizer that made the tokens.
        vocab_size: of the teacher, without padding that it gives no probability.
        store: what is kept; None: up to 64 tokens.

    Raises:
        ValueError: a row is not of this form, or its parts do not belong together.
        OSError: a file cannot be read, or the cache not be written.
    """

    def read(row: dict[str, Any]) -> _Example:
        mask = [weight > 0 for weight in row["loss_mask"]]
        stop = 1 + max((i for i, is_scored in enumerate(mask) if is_scored), default=-1)
        tokens = [*row["tokens"][:stop], *row["labels"][max(0, stop - 1) : stop]]
        if any(row["labels"][i] != tokens[i + 1] for i in range(stop) if mask[i]):
            raise ValueError("its labels are not its tokens, one place on")
        columns = zip(row["topk_token_ids"][:stop], row["topk_logits"], row["log_sum_exp_logits"], mask, strict=False)
        found = [
            {token: logit - log_sum for token, logit in zip(ids, logits, strict=True)} if is_scored else None
            for ids, logits, log_sum, is_scored in columns
        ]
        return _Example(tokens, [False, *mask[:stop]] if stop else [], [None, *found])

    return _convert(files, folder, read, _card(teacher, tokenizer, vocab_size, store), tokenizer)


def from_axolotl(
    files: Sequence[str | Path],
    folder: str | Path,
    *,
    teacher: str,
    tokenizer: str | Path,
    vocab_size: int,
    store: StoreConfig | None = None,
) -> TeacherCache:
    """Tokenised rows for axolotl's distillation: `input_ids`, `labels` (-100: not scored), and what was likely.

    That is either `logprobs`, for each token a list of {"token": "token_id:5", "logprob": -0.1}, as vLLM gives them
    with `return_tokens_as_token_ids`; or numbers in `logprobs`, or `target_logprobs`, and ids in `target_token_ids`.
    Each list is about the token in its place; if there are fewer than tokens, about the last ones.

    Arguments and errors are those of `from_nemo_aligner`.
    """

    def read(row: dict[str, Any]) -> _Example:
        tokens, labels = row["input_ids"], row["labels"]
        stop = 1 + max((i for i, label in enumerate(labels) if label >= 0 and i > 0), default=-1)
        is_label = [i > 0 and label >= 0 for i, label in enumerate(labels[:stop])]
        if any(label != token for label, token, scored in zip(labels, tokens, is_label, strict=False) if scored):
            raise ValueError("its labels are not its tokens, place by place")
        log_probs = row.get("target_logprobs") or row["logprobs"]
        if "target_token_ids" in row:
            pairs = zip(row["target_token_ids"], log_probs, strict=True)
            found: list[Entries | None] = [dict(zip(ids, values, strict=True)) for ids, values in pairs]
        else:
            found = [
                {int(entry["token"].removeprefix("token_id:")): entry["logprob"] for entry in entries or ()}
                for entries in log_probs
            ]
        if len(found) > len(tokens):
            raise ValueError(f"it has {len(tokens)} tokens, and likely ones for {len(found)}")
        return _Example(tokens[:stop], is_label, [*[None] * (len(tokens) - len(found)), *found][:stop])

    return _convert(files, folder, read, _card(teacher, tokenizer, vocab_size, store), tokenizer)


def _card(teacher: str, tokenizer: str | Path, vocab_size: int, store: StoreConfig | None) -> Card:
    store = store or StoreConfig()
    check_kind(store, "such files tell")
    return Card(
        store=store,
        vocab_size=vocab_size,
        teacher=Teacher(teacher, fingerprint=f"files of {teacher}", dtype="unknown"),
        tokenizer=tokenizers.load(tokenizer).fingerprint,
        entropy_of="bucket",
    )


def _convert(
    files: Sequence[str | Path],
    folder: str | Path,
    read: Callable[[dict[str, Any]], _Example],
    card: Card,
    tokenizer: str | Path,
) -> TeacherCache:
    places = _Places()
    with Writer(folder, card) as writer:
        write_tokenizer(folder, checkpoint.read_companions(tokenizer))
        for where, row in _rows(files):
            try:
                example = read(row)
                if not any(example.is_label):
                    continue
                scored = [i for i, is_scored in enumerate(example.is_label) if is_scored]
                if unknown := [i for i in scored if not example.entries[i]]:
                    raise ValueError(f"nothing is said about its token {unknown[0]}, which has a label")
                places.count(example, scored)
                (example_id,) = example_ids(
                    np.array(example.tokens, np.int32), np.array(example.is_label), np.array([len(example.tokens)])
                )
                entries = [example.entries[i] or {} for i in scored]
                labels = [example.tokens[i] for i in scored]
                found = keep_likeliest(entries, labels, card.store, card.vocab_size, may_be_fewer=True)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(f"{where} cannot be used: {kind}{error}.") from None
            writer.add(int(example_id), found)
    return TeacherCache(folder)


class _Places:
    """Whether likely tokens are those of their place: a teacher knows most tokens where they are, and few beside."""

    def __init__(self) -> None:
        self._found = np.zeros(3, np.int64)  # labels among the likely tokens before, at and after their place
        self._total = 0

    def count(self, example: _Example, scored: Sequence[int]) -> None:
        """Look at one example more.

        Raises:
            ValueError: by now it is clear that they are not.
        """
        inner = [i for i in scored if i > 1 and i + 1 < len(example.tokens)]
        for i in inner:
            entries = example.entries[i] or {}
            self._found += [example.tokens[j] in entries for j in (i - 1, i, i + 1)]
        self._total += len(inner)
        before, here, after = self._found.tolist()
        if self._total >= _ENOUGH and max(before, after) > here:
            most, side = max((before, "before"), (after, "after"))
            raise ValueError(
                f"of {self._total} places so far, {here} have their token among the likely ones, and {most} have the "
                f"token {side} it: the lists are shifted by one"
            )


def _rows(files: Sequence[str | Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, and where it is."""
    for path in map(Path, files):
        lines: Iterable[str]
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield f"{path}, line {number},", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}, is no JSON: {error}.") from None
