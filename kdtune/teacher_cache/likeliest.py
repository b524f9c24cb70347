"""Answers from lists of likely tokens, as servers and files of other tools have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kdtune.teacher_cache.answers import NONE, TopK
from kdtune.teacher_cache.config import StoreConfig

Entries = Mapping[int, float | None]  # log-probability by token; None: it has none

_ABOVE_ONE = 1e-3  # by which rounding may lift a probability
_LEAST_REST = 1e-7  # what is left beside numbers of float32 is not known better


def check_kind(store: StoreConfig, tells: str) -> None:
    """Refuse to keep what cannot be known.

    Args:
        store: what is asked for.
        tells: who knows no more than likely tokens.

    Raises:
        ValueError: says why, and what to do.
    """
    if store.kind != "top_k":
        raise ValueError(
            f"store.kind={store.kind} needs the whole distribution, or hidden states, and {tells} the likeliest tokens "
            "alone. Take store.kind=top_k, or run the teacher with cache_teacher_logits."
        )


def keep_likeliest(
    rows: Sequence[Entries], labels: Sequence[int], store: StoreConfig, vocab_size: int, *, may_be_fewer: bool = False
) -> TopK:
    """The `store.top_k` likeliest of each of t labelled tokens, and what follows for all others.

    The entropy is that of the likeliest and one bucket for all others, `entropy_of` bucket of a card.

    Args:
        rows: at least so many tokens each, in any order.
        labels: [t], the token that came. Where a row does not have it, its probability is that of the rest, at most.
        store: what is kept.
        vocab_size: of the teacher.
        may_be_fewer: a row may have less than `store.top_k`.

    Raises:
        ValueError: they are no log-probabilities of tokens, or too few.
    """
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), NONE, np.int64)
    log_probs = np.full(ids.shape, -np.inf)  # [t, width]
    for row, entries in enumerate(rows):
        ids[row, : len(entries)] = list(entries)
        log_probs[row, : len(entries)] = [-np.inf if value is None else value for value in entries.values()]
    is_there = ids != NONE
    if ids[is_there].min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
        raise ValueError(f"token {ids.max()} is none of the {vocab_size:,} of the vocabulary.")
    mass = np.exp(log_probs).sum(1)
    if not ((mass > 0) & (mass <= 1 + _ABOVE_ONE)).all():
        raise ValueError(f"its numbers are no log-probabilities: of a token they add up to {mass.max():.4g}.")
    fewest, wanted = int(is_there.sum(1).min(initial=vocab_size)), min(store.top_k, vocab_size)
    if fewest < (1 if may_be_fewer else wanted):
        raise ValueError(f"it has {fewest} likely tokens, and store.top_k={store.top_k} asks for {wanted}.")
    label_log_probs = np.array([row.get(label) for row, label in zip(rows, labels, strict=True)], np.float64)

    order = np.lexsort((ids, -log_probs))[:, :wanted]
    ids, log_probs = (np.take_along_axis(part, order, 1) for part in (ids, log_probs))
    p = np.exp(log_probs)
    is_kept = ids != NONE
    if store.top_p is not None:
        is_kept &= np.concatenate([np.zeros((len(p), 1)), p.cumsum(1)[:, :-1]], 1) < store.top_p
    is_kept &= p > 0  # what a server writes for a probability of 0
    is_kept[:, :1] = True
    used = int(is_kept.sum(1).max(initial=1))
    ids, log_probs, is_kept = ids[:, :used], log_probs[:, :used], is_kept[:, :used]
    p = np.where(is_kept, p[:, :used], 0)
    rest = np.maximum(1 - p.sum(1), _LEAST_REST)
    rest[is_kept.sum(1) == vocab_size] = 0
    with np.errstate(divide="ignore"):
        log_rest = np.log(rest)
    entropy = -(p * np.where(is_kept, log_probs, 0)).sum(1) - rest * np.where(rest > 0, log_rest, 0)
    return TopK(
        np.where(is_kept, ids, NONE).astype(np.int32),
        np.where(is_kept, np.minimum(log_probs, 0), -np.inf).astype(np.float32),
        log_rest.astype(np.float32),
        entropy.clip(min=0).astype(np.float32),
        np.minimum(np.where(np.isnan(label_log_probs), log_rest, label_log_probs), 0).astype(np.float32),
    )
