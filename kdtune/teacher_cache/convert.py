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
from kdtune.teacher_cache.answers import TopK
from kdtune.teacher_cache.card import Card, Teacher
from kdtune.teacher_cache.config import StoreConfig
from kdtune.teacher_cache.likeliest import Entries, check_kind, keep_likeliest
from kdtune.teacher_cache.store import TeacherCache, Writer, write_tokenizer

_ENOUGH, _FEW = 200, 10  # places that tell whether likely tokens are theirs; and hits that may be chance


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
    store = store or StoreConfig(kind="top_k")
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
    with Writer(folder, card) as writer:
        write_tokenizer(folder, checkpoint.read_companions(tokenizer))
        for example_id, answers in _in_place(_answers(files, read, card)):
            writer.add(example_id, answers)
    return TeacherCache(folder)


def _answers(
    files: Sequence[str | Path], read: Callable[[dict[str, Any]], _Example], card: Card
) -> Iterator[tuple[int, TopK, np.ndarray]]:
    """Of each row with a label the id, the answers, and how many tokens are among what is likely beside their place.

    These are [4]: the tokens before, at and after the places that have both neighbours, and how many places these are.
    """
    for where, row in _rows(files):
        try:
            tokens, is_label, entries = read(row)
            scored = [i for i, is_scored in enumerate(is_label) if is_scored]
            if not scored:
                continue
            if unknown := [i for i in scored if not entries[i]]:
                raise ValueError(f"nothing is said about its token {unknown[0]}, which has a label")
            (example_id,) = example_ids(np.array(tokens, np.int32), np.array(is_label), np.array([len(tokens)]))
            likely = {i: entries[i] or {} for i in scored}
            labels = [tokens[i] for i in scored]
            found = keep_likeliest(list(likely.values()), labels, card.store, card.vocab_size, may_be_fewer=True)
            inner = [i for i in scored if 1 < i < len(tokens) - 1]
            beside = [sum(tokens[i + step] in likely[i] for i in inner) for step in (-1, 0, 1)]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{where} cannot be used: {kind}{error}.") from None
        yield int(example_id), found, np.array([*beside, len(inner)])


def _in_place(answers: Iterable[tuple[int, TopK, np.ndarray]]) -> Iterator[tuple[int, TopK]]:
    """The answers, once the first of them have been seen to be those of their places.

    A teacher knows most tokens where they are, and few beside.

    Raises:
        ValueError: they are not.
    """
    held: list[tuple[int, TopK]] = []
    seen = np.zeros(4, np.int64)
    for example_id, found, beside in answers:
        held.append((example_id, found))
        if seen[3] < _ENOUGH:
            seen += beside
            if seen[3] < _ENOUGH:
                continue
            _check_places(*seen.tolist())
        yield from held
        held.clear()
    if held:
        _check_places(*seen.tolist())
        yield from held


def _check_places(before: int, here: int, after: int, count: int) -> None:
    most, side = max((before, "before"), (after, "after"))
    if most > here and most >= _FEW:
        raise ValueError(
            f"The likely tokens are shifted by one: of the first {count} places {here} have their own token among "
            f"them, and {most} have the token {side} it. No answer is kept."
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
