"""What a teacher says about the labelled tokens of an example, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from kdtune.teacher_cache.config import HiddenDtype

NONE = -1  # the id where a token has fewer entries than another


@dataclass(frozen=True)
class TopK:
    """The likeliest next tokens of each of t labelled tokens.

    A teacher's, `ids` and `log_probs` may come in any order; of equal ones the first counts as the likeliest. Read from
    a cache, the likeliest is the first, the others are in no order of their probabilities, and those of a token and its
    rest add up to 1.

    Attributes:
        ids: [t, k] int32, none twice in a row; -1, at the end, where a row has fewer.
        log_probs: [t, k] float32, log p over the whole vocabulary; -inf where there is no id.
        log_rest: [t] float32, log of the probability of all other tokens.
        entropy: [t] float32, of the whole distribution, in nats.
        label_log_probs: [t] float32, log p of the token's label.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    log_rest: np.ndarray
    entropy: np.ndarray
    label_log_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def top_ids(self) -> np.ndarray:
        """[t] int32, the likeliest."""
        return np.take_along_axis(self.ids, self.log_probs.argmax(1)[:, None], 1)[:, 0]


@dataclass(frozen=True)
class Samples:
    """Random draws from the teacher's distribution p at each of t labelled tokens, with replacement.

    For every f, the expectation of sum(weights * f(ids)) over the draws is sum(p * f) ("Random Sampling Knowledge
    Distillation", Anshumann et al. 2025, arXiv:2503.16870, section 3).

    Attributes:
        ids: [t, n] int32, none twice in a row; -1, at the end, where a row has fewer. The likeliest token is always
            among them, be it drawn or not.
        counts: [t, n] int32, how often it was drawn; 0 for a likeliest that was not, and where there is no id.
        log_ratios: [t, n] float32, log of p / proposal, from which it was drawn; 0 where it was not. None: it was drawn
            from p.
        num_samples: draws for each token.
        entropy: [t] float32, of p, in nats.
        label_log_probs: [t] float32, log p of the token's label.
        top_ids: [t] int32, the likeliest.
    """

    ids: np.ndarray
    counts: np.ndarray
    log_ratios: np.ndarray | None
    num_samples: int
    entropy: np.ndarray
    label_log_probs: np.ndarray
    top_ids: np.ndarray

    @classmethod
    def from_draws(
        cls,
        draws: np.ndarray,
        log_ratios: np.ndarray | None,
        entropy: np.ndarray,
        label_log_probs: np.ndarray,
        top_ids: np.ndarray,
    ) -> Samples:
        """Count equal draws.

        Args:
            draws: [t, num_samples] ids, in any order; sorted ones take half the time.
            log_ratios: [t, num_samples], log(p / proposal) of each draw; None: drawn from p.
            entropy: [t].
            label_log_probs: [t].
            top_ids: [t].
        """
        ids = np.concatenate([top_ids[:, None], draws], 1).astype(np.int32)  # [t, n + 1]
        order = ids.argsort(1, kind="stable")  # the undrawn copy of the likeliest comes before the drawn ones
        ids = np.take_along_axis(ids, order, 1)
        is_first = np.ones(ids.shape, bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        rows, _ = is_first.nonzero()
        size = np.bincount(rows, minlength=len(ids))  # [t] different ids
        column = np.arange(len(rows)) - np.repeat(size.cumsum() - size, size)
        shape = (len(ids), size.max(initial=0))

        def gather(values: np.ndarray, fill: int) -> np.ndarray:
            out = np.full(shape, fill, values.dtype)
            out[rows, column] = values
            return out

        drawn = (order > 0).astype(np.int32).ravel()
        counts = np.add.reduceat(drawn, is_first.ravel().nonzero()[0]) if len(rows) else drawn
        ratios = None
        if log_ratios is not None:
            # Equal draws have equal ratios; that of the last of them is never the undrawn copy's, if one was drawn.
            padded = np.concatenate([np.zeros((len(ids), 1)), log_ratios], 1).astype(np.float32)
            is_last = np.ones(ids.shape, bool)
            is_last[:, :-1] = is_first[:, 1:]
            ratios = gather(np.take_along_axis(padded, order, 1)[is_last], 0)
        return cls(
            gather(ids[is_first], NONE),
            gather(counts, 0),
            ratios,
            draws.shape[1],
            entropy.astype(np.float32),
            label_log_probs.astype(np.float32),
            top_ids.astype(np.int32),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def weights(self) -> np.ndarray:
        """[t, n] float32: count / num_samples * p / proposal. A row adds up to 1 only on average."""
        weights = (self.counts / np.float32(self.num_samples)).astype(np.float32)
        return weights if self.log_ratios is None else weights * np.exp(self.log_ratios)


@dataclass(frozen=True)
class Hidden:
    """The teacher's final hidden states at t labelled tokens, after the last norm.

    Attributes:
        hidden: [t, d], float32, or the bits of bf16 as uint16: `torch.from_numpy(hidden).view(torch.bfloat16)`.
        dtype: which of the two.
    """

    hidden: np.ndarray
    dtype: HiddenDtype

    def __len__(self) -> int:
        return len(self.hidden)


Answers = TopK | Samples | Hidden
A = TypeVar("A", bound=Answers)


def concatenate(answers: Sequence[A]) -> A:
    """Those of several examples of one cache, one behind the other; rows are filled up to the widest.

    Args:
        answers: at least one, all of one kind.
    """
    first = answers[0]

    def join(name: str) -> Any:
        columns = [getattr(part, name) for part in answers]
        if not isinstance(columns[0], np.ndarray):
            return columns[0]
        if columns[0].ndim == 1 or len({column.shape[1] for column in columns}) == 1:
            return np.concatenate(columns)
        fill = {"ids": NONE, "log_probs": -np.inf}.get(name, 0)
        joined = np.full((sum(map(len, columns)), max(column.shape[1] for column in columns)), fill, columns[0].dtype)
        start = 0
        for column in columns:
            joined[start : start + len(column), : column.shape[1]] = column
            start += len(column)
        return joined

    return type(first)(**{field.name: join(field.name) for field in fields(first)})


def take(answers: A, rows: slice | np.ndarray) -> A:
    """Those to some of the tokens."""
    columns = {field.name: getattr(answers, field.name) for field in fields(answers)}
    taken: dict[str, Any] = {name: x[rows] for name, x in columns.items() if isinstance(x, np.ndarray)}
    return replace(answers, **taken)
