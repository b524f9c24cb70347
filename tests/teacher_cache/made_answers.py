"""Distributions of a made-up teacher, and what is kept of them."""

from __future__ import annotations

import numpy as np

from kdtune.teacher_cache import Samples, TopK


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_probs(seed: int, num_tokens: int, vocab_size: int) -> np.ndarray:
    """[t, v] float64: a few frequent tokens, and in each row some likely and many unlikely ones."""
    generator = np.random.default_rng(seed)
    scale = generator.uniform(1, 4, (num_tokens, 1))
    frequency = -np.log(generator.permutation(vocab_size) + 3)
    return log_softmax(frequency + scale * generator.normal(size=(num_tokens, vocab_size)))


def statistics(log_p: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Entropy of the whole, and log p of random labels."""
    labels = np.random.default_rng(seed).integers(log_p.shape[1], size=(len(log_p), 1))
    return {
        "entropy": -(np.exp(log_p) * log_p).sum(1).astype(np.float32),
        "label_log_probs": np.take_along_axis(log_p, labels, 1)[:, 0].astype(np.float32),
    }


def top_k(seed: int, num_tokens: int, k: int, vocab_size: int, top_p: float | None = None) -> TopK:
    log_p = log_probs(seed, num_tokens, vocab_size)
    order = log_p.argsort(1)[:, ::-1]
    ordered = np.take_along_axis(log_p, order, 1)
    before = np.exp(ordered).cumsum(1) - np.exp(ordered)
    kept = (np.arange(vocab_size) < k) & (before < (top_p or 2))
    with np.errstate(divide="ignore"):  # nothing is left of a whole vocabulary
        log_rest = np.log(np.where(kept, 0, np.exp(ordered)).sum(1))
    return TopK(
        ids=np.where(kept, order, -1)[:, :k].astype(np.int32),
        log_probs=np.where(kept, ordered, -np.inf)[:, :k].astype(np.float32),
        log_rest=log_rest.astype(np.float32),
        **statistics(log_p, seed),
    )


def samples(seed: int, num_tokens: int, count: int, vocab_size: int, power: float = 1.0) -> Samples:
    log_p = log_probs(seed, num_tokens, vocab_size)
    proposal = log_softmax(power * log_p)
    generator = np.random.default_rng(seed)
    draws = np.stack([generator.choice(vocab_size, count, p=np.exp(row)) for row in proposal])
    ratios = None if power == 1 else np.take_along_axis(log_p - proposal, draws, 1)
    return Samples.from_draws(draws, ratios, top_ids=log_p.argmax(1), **statistics(log_p, seed))
