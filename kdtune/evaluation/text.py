"""Held-out text: what a model makes of each scored token of it, alone and beside its teacher.

The logits of all tokens are never there at one time; what is kept of each token is a few numbers, and of an example
their sums. p is the teacher's distribution and q the student's, at temperature 1, in float32. Vocabularies may differ
by padding at their end: what compares both is over the entries that both have, each distribution normalised over those,
as in training; the cross-entropy, accuracy, entropy and calibration of the student are over all of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdtune.data import IGNORE, Batch, Blend, Examples
from kdtune.evaluation.estimates import NUM_BINS
from kdtune.evaluation.results import Example, TokenExample
from kdtune.losses import Targets, block_rows, default_chunk_size, logits_of
from kdtune.models import Decoder
from kdtune.tokenizers import Tokenizer

_LOG_ZERO = -1e38  # instead of -inf, so that 0 * log 0 is 0
_INFINITE = 1e12  # a divergence beyond it has met log 0 where the other distribution is not 0
_TOP = 5
T = TypeVar("T")


class Tokens(NamedTuple):
    """What was found at the scored tokens of one or several examples, [t] each; of no teacher, nothing."""

    sums: dict[str, np.ndarray]  # numbers whose sums make metrics
    confidence: np.ndarray  # the student's probability of its most likely token
    student_top: np.ndarray  # that token
    teacher_top: np.ndarray | None  # the teacher's


@dataclass(frozen=True)
class Scored:
    """An example that went through the models.

    Attributes:
        id: as in `Examples.ids`.
        example: what it adds to the metrics.
        tokens: one by one, if they are wanted.
    """

    id: int
    example: Example
    tokens: Tokens | None


class Scorer:
    """Holds a model, and its teacher, against text.

    Args:
        student: all ranks that hold it together call with the same rows.
        tokenizer: of the text.
        wanted: ids of the examples whose tokens are kept one by one.
        chunk_size: tokens whose logits exist at one time; None: automatic.
    """

    def __init__(
        self, student: Decoder, tokenizer: Tokenizer, wanted: Collection[int] = (), chunk_size: int | None = None
    ) -> None:
        self._student = student
        self._wanted = frozenset(wanted)
        self._chunk_size = chunk_size
        self._num_bytes = np.zeros(max(student.config.vocab_size, tokenizer.vocab_size), np.int64)
        for id in set(tokenizer.ids()) - tokenizer.special_ids:
            self._num_bytes[id] = len(tokenizer.piece_bytes(id))

    @torch.no_grad()
    def __call__(self, batch: Batch, targets: Targets | None, subset: str | None = None) -> list[Scored]:
        """Score the examples of a batch.

        Args:
            batch: whole rows, on the host.
            targets: what the teacher says about it; None: there is none.
            subset: of the data set, to which they belong.
        """
        keys, labels = batch.keys(), batch.labels[batch.labels != IGNORE].numpy()  # before they are on the device
        batch = batch.to(self._student.device)
        hidden = self._student.hidden(batch.tokens, batch.positions, batch.documents)  # [b, s, d]
        if not len(labels):
            return []
        found = self._measure(hidden, batch, targets)
        starts = keys.starts()
        example_of = np.repeat(np.arange(len(starts)), np.diff([*starts, len(labels)]))  # [t]
        sums = {name: np.add.reduceat(values, starts).tolist() for name, values in found.sums.items()}
        num_bytes = np.add.reduceat(self._num_bytes[labels], starts).tolist()
        bins = np.zeros((len(starts), NUM_BINS, 3))
        # As in the paper, a bin holds its upper end.
        own = np.clip(np.ceil(found.confidence * NUM_BINS) - 1, 0, NUM_BINS - 1).astype(int)
        for column, values in enumerate((np.ones(len(labels)), found.confidence, found.sums["accuracy"])):
            np.add.at(bins[..., column], (example_of, own), values)
        scored = []
        for i, (start, stop) in enumerate(zip(starts, [*starts[1:], len(labels)], strict=True)):
            id = int(keys.examples[start])
            example = Example(
                task="text",
                id=f"{id:016x}",
                subset=subset,
                num_tokens=int(stop - start),
                num_bytes=num_bytes[i],
                sums={name: values[i] for name, values in sums.items()},
                calibration=bins[i].tolist(),
            )
            scored.append(Scored(id, example, _part(found, slice(start, stop)) if id in self._wanted else None))
        return scored

    def _measure(self, hidden: Tensor, batch: Batch, targets: Targets | None) -> Tokens:
        """The scored tokens of a batch on the student's device, in their order."""
        assert batch.scored is not None
        labels = batch.labels.flatten()[batch.scored][:, None]  # [t, 1]
        heads: list[Any] = [self._student.head, *(() if targets is None else (targets.head,))]
        sizes = [head.weight.shape[0] for head in heads]
        chunk_size = self._chunk_size or default_chunk_size(sizes[0], sum(sizes[1:]), hidden.device)
        rows = block_rows(max(sizes), hidden.device)
        of_student = logits_of(hidden, heads[0], batch.scored, chunk_size)
        of_teacher = None if targets is None else logits_of(targets.hidden, targets.head, batch.scored, chunk_size)
        found: dict[str, list[Tensor]] = defaultdict(list)
        for part, logits in of_student:
            theirs = None if of_teacher is None else next(of_teacher)[1]
            for start in range(0, len(logits), rows):
                block = slice(start, start + rows)
                values = _values(logits[block], None if theirs is None else theirs[block], labels[part][block])
                for name, value in values.items():
                    found[name].append(value)
        on_host = {name: torch.cat(values).cpu().numpy() for name, values in found.items()}
        confidence, student_top = on_host.pop("confidence").astype(np.float64), on_host.pop("student_top")
        teacher_top = on_host.pop("teacher_top", None)
        sums = {name: values.astype(np.float64) for name, values in on_host.items()}
        return Tokens(sums, confidence, student_top, teacher_top)


def _values(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """[r] each, from [r, v], [r, v_t] and [r, 1]."""
    log_q = logits.log_softmax(-1).clamp_(min=_LOG_ZERO)
    q = log_q.exp()
    largest, top = log_q.max(-1)
    values = {
        "ce": -log_q.gather(-1, labels)[:, 0],
        "accuracy": top == labels[:, 0],
        "confidence": largest.exp(),
        "student_top": top,
        "entropy": -(q * log_q).sum(-1),
    }
    if teacher_logits is None:
        return values
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    log_p = teacher_logits[:, :shared].log_softmax(-1).clamp_(min=_LOG_ZERO)
    p = log_p.exp()
    if shared < logits.shape[-1]:
        log_q = logits[:, :shared].log_softmax(-1).clamp_(min=_LOG_ZERO)
        q, top = log_q.exp(), log_q.argmax(-1)
    log_ratio, rest = log_p - log_q, q - p  # `rest` is 0 in sum, and no term is below 0 with it
    forward, reverse = (p * log_ratio).add_(rest).sum(-1), -(q * log_ratio).add_(rest).sum(-1)
    teacher_top = log_p.argmax(-1, keepdim=True)  # [r, 1]
    num_likelier = (log_q > log_q.gather(-1, teacher_top)).sum(-1)  # in the student's distribution
    return values | {
        "kl_from_teacher": forward.masked_fill(forward > _INFINITE, torch.inf),
        "kl_to_teacher": reverse.masked_fill(reverse > _INFINITE, torch.inf),
        "top1_agreement": top == teacher_top[:, 0],
        "top5_agreement": num_likelier < _TOP,
        "teacher_ce": -log_p.gather(-1, labels)[:, 0],
        "teacher_entropy": -(p * log_p).sum(-1),
        "teacher_accuracy": teacher_top[:, 0] == labels[:, 0],
        "teacher_top": teacher_top[:, 0],
    }


def _part(found: Tokens, which: slice) -> Tokens:
    sums = {name: values[which] for name, values in found.sums.items()}
    teacher_top = None if found.teacher_top is None else found.teacher_top[which]
    return Tokens(sums, found.confidence[which], found.student_top[which], teacher_top)


def in_order(scored: Iterable[Scored], examples: Examples | Blend) -> list[Scored]:
    """Those of all ranks in the order of the data set, so that nothing depends on batches."""
    sources = examples.sources if isinstance(examples, Blend) and len(examples.sources) > 1 else {None: examples}
    by_id: dict[tuple[str | None, int], list[Scored]] = defaultdict(list)  # rows that are alike have the same id
    for one in scored:
        by_id[one.example.subset, one.id].append(one)
    return [by_id[name, id].pop() for name, source in sources.items() for id in source.ids.tolist()]


def spell(scored: Scored, inputs: Tensor, labels: Tensor, tokenizer: Tokenizer) -> TokenExample:
    """An example whose tokens were wanted, as text.

    Args:
        scored: it.
        inputs: [s], its tokens but the last.
        labels: [s], what follows each of them, or IGNORE.
        tokenizer: theirs.
    """
    assert scored.tokens is not None
    ids = [*inputs.tolist(), int(labels[-1])]  # an example ends with a label
    is_scored = (labels != IGNORE).tolist()
    first = is_scored.index(True)

    def spread(values: Iterable[T]) -> list[T | None]:
        """None for the tokens that are not scored, from the first that is."""
        remaining = iter(values)
        return [next(remaining) if flag else None for flag in is_scored[first:]]

    def numbers(values: np.ndarray) -> list[float | None]:
        return spread(float(f"{value:.5g}") for value in values)

    known = frozenset(tokenizer.ids())

    def texts(some: Iterable[int]) -> list[str]:
        return [_text_of(id, tokenizer, known) for id in some]

    found = scored.tokens
    kl, teacher_top = found.sums.get("kl_from_teacher"), found.teacher_top
    return TokenExample(
        id=scored.example.id,
        context=tokenizer.decode([id for id in ids[: first + 1] if id in known]),
        tokens=texts(ids[first + 1 :]),
        ce=numbers(found.sums["ce"]),
        kl=None if kl is None else numbers(kl),
        student_top=spread(texts(found.student_top.tolist())),
        teacher_top=None if teacher_top is None else spread(texts(teacher_top.tolist())),
    )


def _text_of(id: int, tokenizer: Tokenizer, known: Collection[int]) -> str:
    if id not in known:
        return f"<id {id}>"
    return tokenizer.piece_bytes(id).decode(errors="backslashreplace")
