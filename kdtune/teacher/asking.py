"""What a cache keeps of a teacher's distributions, made from the hidden states of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kdtune.data import IGNORE, Batch, Keys
from kdtune.distributed import Ranks
from kdtune.dtensors import whole
from kdtune.losses import logits_of
from kdtune.teacher.live import LiveTeacher
from kdtune.teacher_cache import Answers, Hidden, Samples, StoreConfig, TopK, concatenate, take, write_head
from kdtune.teacher_cache.config import HiddenDtype


@torch.no_grad()
def ask(
    teacher: LiveTeacher, batch: Batch, store: StoreConfig, *, seed: int = 0, chunk_size: int | None = None
) -> Iterator[tuple[int, Answers]]:
    """What the teacher says about the examples of a batch, each with its id.

    Args:
        teacher: all ranks that hold it together call with the same rows, and find the same.
        batch: whole rows, on the host.
        store: what is kept of its distributions.
        seed: of random draws, which depend on it and the example alone, not on the batch.
        chunk_size: labelled tokens whose logits exist at one time; None: automatic.
    """
    keys = batch.keys()
    targets = teacher(batch)
    hidden, head = targets.hidden.flatten(0, -2), targets.head  # [b * s, d]
    scored = (batch.labels.flatten() != IGNORE).nonzero()[:, 0]
    if not len(scored):
        return
    labels = batch.labels.flatten()[scored].to(hidden.device)
    scored = scored.to(hidden.device)
    if store.kind == "hidden":
        found: Answers = _hidden(hidden[scored], store.hidden_dtype)
    else:
        parts: list[Answers] = []
        for rows, logits in logits_of(hidden, head, scored, chunk_size):
            about = _Distributions(logits, labels[rows])
            if store.kind == "top_k":
                parts.append(_top_k(about, store))
            else:
                parts.append(_draw(about, Keys(*(part[rows] for part in keys)), store, seed))
        found = concatenate(parts)
    starts = keys.starts()
    for start, stop in zip(starts, [*starts[1:], len(keys.places)], strict=True):
        yield int(keys.examples[start]), take(found, slice(start, stop))


@torch.no_grad()
def keep_head(teacher: LiveTeacher, folder: str, dtype: HiddenDtype, ranks: Ranks) -> None:
    """Write the head beside hidden states; all ranks must call.

    Args:
        teacher: whose head it is.
        folder: of the cache.
        dtype: in which it is written.
        ranks: the processes, of which one writes.
    """
    weight = whole(teacher.head.weight)
    if ranks.is_first_with_head:
        write_head(folder, _hidden(weight, dtype).hidden, dtype)


class _Distributions:
    """Of n positions. What crosses the vocabulary is as little as there can be: it is what asking adds to the forward.

    Args:
        logits: [n, v]; overwritten.
        labels: [n].

    Attributes:
        below: [n, v], logits less the largest of the row.
        weights: [n, v], exponentials of these.
        total: [n, 1], their sum.
        facts: what is known of a whole distribution, [n] each.
    """

    def __init__(self, logits: Tensor, labels: Tensor):
        largest = logits.amax(-1, keepdim=True)
        self.below = logits.sub_(largest).clamp_(min=-1e38)  # not -inf, of which 0 times is no number
        self.weights = self.below.exp()
        self.total = self.weights.sum(-1, keepdim=True)
        mean = (self.weights * self.below).sum(-1) / self.total[:, 0]
        self.facts = {
            "entropy": self.total[:, 0].log() - mean,
            "label_log_probs": self.log_probs(labels[:, None])[:, 0],
        }

    def log_probs(self, ids: Tensor) -> Tensor:
        """[n, k] of tokens."""
        return self.below.gather(-1, ids) - self.total.log()


def _top_k(of: _Distributions, store: StoreConfig) -> TopK:
    ids = of.below.topk(min(store.top_k, of.below.shape[-1])).indices  # [n, k], likeliest first
    log_probs = of.log_probs(ids)
    kept = ids
    if store.top_p is not None:
        before = log_probs.exp().cumsum(-1).roll(1, -1)  # the mass of those that are likelier
        before[:, 0] = 0
        is_kept = before < store.top_p
        width = int(is_kept.sum(-1).max())
        log_probs, ids, is_kept = log_probs[:, :width], ids[:, :width], is_kept[:, :width]
        kept = torch.where(is_kept, ids, ids[:, :1])
        log_probs, ids = log_probs.masked_fill(~is_kept, -torch.inf), ids.masked_fill(~is_kept, -1)
    # Not 1 - sum p, of which rounding is all that is left.
    log_rest = (of.weights.scatter_(-1, kept, 0).sum(-1) / of.total[:, 0]).log()
    facts = {name: _numpy(values) for name, values in of.facts.items()}
    return TopK(_numpy(ids, np.int32), _numpy(log_probs), _numpy(log_rest), **facts)


def _draw(of: _Distributions, keys: Keys, store: StoreConfig, seed: int) -> Samples:
    """Draws from p^power / Z, by the inverse of its distribution function."""
    weights = of.weights if store.sampling_power == 1 else (store.sampling_power * of.below).exp_()
    # In float64, whose sums over a vocabulary do not lose the unlikely ones.
    mass = weights.cumsum(-1, dtype=torch.float64)  # [n, v]
    numbers = torch.from_numpy(_numbers(keys, store.num_samples, seed)).to(mass.device)  # [n, num_samples]
    draws = torch.searchsorted(mass, numbers * mass[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)
    draws = draws.sort(-1).values  # here, where it is fast: of sorted ones the host counts equal ones in half the time
    log_ratios = None
    if store.sampling_power != 1:
        log_proposal = store.sampling_power * of.below.gather(-1, draws) - mass[:, -1:].log()
        log_ratios = _numpy(of.log_probs(draws) - log_proposal)
    return Samples.from_draws(
        _numpy(draws, np.int32),
        log_ratios,
        top_ids=_numpy(of.below.argmax(-1), np.int32),
        **{name: _numpy(values) for name, values in of.facts.items()},
    )


def _numbers(keys: Keys, count: int, seed: int) -> np.ndarray:
    """[n, count] in [0, 1): a function of the seed, the example and the place in it."""
    numbers = np.empty((len(keys.places), count))
    starts = keys.starts()
    for start, stop in zip(starts, [*starts[1:], len(keys.places)], strict=True):
        generator = np.random.default_rng([seed, int(keys.examples[start])])
        generator.bit_generator.advance(int(keys.places[start]) * count)  # type: ignore[attr-defined]
        numbers[start:stop] = generator.random((stop - start, count))
    return numbers


def _hidden(states: Tensor, dtype: HiddenDtype) -> Hidden:
    if dtype == "bf16":
        return Hidden(states.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16), "bf16")
    return Hidden(_numpy(states), "fp32")


def _numpy(x: Tensor, dtype: type = np.float32) -> np.ndarray:
    return x.cpu().numpy().astype(dtype)
