"""How likely a model finds continuations of contexts, many at a time, each context computed once.

What multiple-choice benchmarks ask of a model: four answers to one question, and many questions behind the same worked
examples. Of tokens that several requests begin with, keys and values are computed once and kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from kdtune.distributed import ALONE, Ranks
from kdtune.documents import Documents
from kdtune.metrics import token_bar
from kdtune.models import Decoder, KVCache

# Tokens that requests must have in common for their keys and values to be kept: for fewer, a forward more costs more.
_WORTH_KEEPING = 16
_WORTH_GATHERING = 8  # requests that begin alike, for them to go before others of their length
SLOTS = 4  # of keys and values for each token that is computed at a time: those that are kept take memory alone
_LOGITS = 2**25  # at a time: 128 MiB of float32


class Request(NamedTuple):
    """What is to be scored."""

    context: Sequence[int]  # at least one token
    continuation: Sequence[int]  # at least one token


class Score(NamedTuple):
    """Of a request."""

    log_likelihood: float  # of the whole continuation, in nats
    is_greedy: bool  # each of its tokens is the one that the model finds likeliest there


def score(
    model: Decoder, requests: Sequence[Request], *, max_tokens: int = 2048, ranks: Ranks = ALONE, progress: bool = True
) -> list[Score]:
    """Score each continuation behind its context.

    Each is what it would be by itself, up to the rounding of the device.

    Args:
        model: in any dtype, on any device; log-probabilities are float32.
        requests: of at most `model.config.max_seq_len` tokens as input, which is all but the last (see `fit`).
        max_tokens: that are computed at a time, which bounds the memory. A single row may have more.
        ranks: the processes; those that hold a model together compute the same requests, others share them.
        progress: whether the first rank shows how far it is, in tokens of the requests.

    Returns:
        In the order of the requests; on all ranks.

    Raises:
        ValueError: a request without a token to score, or to predict it from; or one that is too long.
    """
    _check(requests, model.config.max_seq_len)
    # With dynamic rope, keys turn by the length of their row.
    groups = _groups(requests, max_tokens, shares=model.config.rope.type != "dynamic")
    batches = list(_batches(groups, max_tokens))
    totals = np.zeros(len(requests))
    is_greedy = np.ones(len(requests), dtype=bool)
    bar = token_bar(sum(map(_num_tokens, requests))) if progress and ranks.is_first else None
    for start in range(0, len(batches), ranks.num_replicas):
        for batch in batches[start + ranks.replica : start + ranks.replica + 1]:
            for numbers, log_probs, agrees in _compute(model, batch):
                np.add.at(totals, numbers, log_probs)
                np.logical_and.at(is_greedy, numbers, agrees)
        if bar is not None:
            of_all = chain(*(batch.groups for batch in batches[start : start + ranks.num_replicas]))
            bar.update(sum(_num_tokens(requests[number]) for group in of_all for number in group.numbers))
    if bar is not None:
        bar.close()
    if ranks.num_replicas > 1:  # each has found zero and True for what is not its own
        of_replicas = dict(ranks.gather((ranks.replica, (totals, is_greedy))))
        totals = np.sum([found for found, _ in of_replicas.values()], axis=0)
        is_greedy = np.all([found for _, found in of_replicas.values()], axis=0)
    return [Score(*found) for found in zip(totals.tolist(), is_greedy.tolist(), strict=True)]


def fit(requests: Sequence[Request], max_seq_len: int) -> list[Request]:
    """Cut the beginnings of contexts off where a request is longer than the model's rows.

    Args:
        requests: of any length.
        max_seq_len: tokens that a row may have as input.

    Raises:
        ValueError: a continuation alone is too long.
    """
    fitting = []
    for number, request in enumerate(requests):
        room = max_seq_len + 1 - len(request.continuation)
        if room < 1:
            raise ValueError(
                f"Request {number}: a continuation of {len(request.continuation)} tokens, and the model takes "
                f"{max_seq_len}: part of what is to be scored would be cut off. Leave it out, or score it as a text of "
                "its own in windows."
            )
        fitting.append(Request(request.context[-room:], request.continuation))
    return fitting


def windows(tokens: Sequence[int], prefix: int, max_seq_len: int) -> list[Request]:
    """Cut a long text into requests that score each of its tokens once, with as much before it as is left of a row.

    As lm-evaluation-harness does: windows follow each other, each begins with the token before it, and the last one is
    filled with what is before it.

    Args:
        tokens: of the text.
        prefix: the token from which the first is predicted, bos as a rule.
        max_seq_len: tokens of a row.
    """
    text = [prefix, *tokens]  # what is scored is text[1:]
    found = []
    for start in range(0, len(tokens), max_seq_len):
        end = min(start + max_seq_len, len(tokens))
        begin = max(0, end - max_seq_len)
        found.append(Request(text[begin : start + 1], text[start + 1 : end + 1]))
    return found


@dataclass
class _Row:
    """Tokens that go through the model behind others, and what is looked up at which of their positions."""

    tokens: list[int]
    start: int  # position of the first of them
    wanted: list[tuple[int, int, int]] = field(default_factory=list)  # position, next token, number of the request


@dataclass
class _Group:
    """Requests with the same context: what they have in common, and what each of them adds."""

    numbers: list[int]
    trunk: _Row
    branches: list[_Row]

    @property
    def longest_branch(self) -> int:
        return max((len(branch.tokens) for branch in self.branches), default=0)

    @property
    def first_wanted(self) -> int:
        return min(position for position, _, _ in self.trunk.wanted)


@dataclass(frozen=True)
class _Batch:
    """Groups that go through the model together.

    Attributes:
        groups: of requests.
        prefix: what all of them begin with, before the first place at which anything is looked up.
        width: tokens of the longest trunk.
        num_branches: of all groups.
        depth: tokens of the longest branch.
    """

    groups: tuple[_Group, ...] = ()
    prefix: list[int] = field(default_factory=list)
    width: int = 0
    num_branches: int = 0
    depth: int = 0

    def plus(self, group: _Group) -> _Batch:
        beginning = group.trunk.tokens[: group.first_wanted]
        return _Batch(
            (*self.groups, group),
            _in_common([self.prefix, beginning]) if self.groups else beginning,
            max(self.width, len(group.trunk.tokens)),
            self.num_branches + len(group.branches),
            max(self.depth, group.longest_branch),
        )

    @property
    def kept(self) -> list[int]:
        """The prefix, if it is worth a forward of its own."""
        return self.prefix if len(self.groups) > 1 and len(self.prefix) >= _WORTH_KEEPING else []

    def fits(self, max_tokens: int) -> bool:
        rows = len(self.groups)
        computed = max(rows * (self.width - len(self.kept)), self.num_branches * self.depth)
        slots = max(rows * self.width, self.num_branches * (self.width + self.depth))
        return computed <= max_tokens and slots <= SLOTS * max_tokens


def _num_tokens(request: Request) -> int:
    return len(request.context) + len(request.continuation)


def _in_common(rows: Sequence[list[int]]) -> list[int]:
    """What all of them begin with."""
    low, high = min(rows), max(rows)  # between which the others are
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]


def _groups(requests: Sequence[Request], max_tokens: int, shares: bool) -> list[_Group]:
    by_context: dict[tuple[int, ...] | int, list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(requests):
        is_shared = shares and len(context) >= _WORTH_KEEPING
        by_context[tuple(context) if is_shared else number].append(number)
    groups = []
    for numbers in by_context.values():
        longest = max(_num_tokens(requests[number]) for number in numbers)
        at_a_time = max(1, SLOTS * max_tokens // longest)
        parts = (numbers[i : i + at_a_time] for i in range(0, len(numbers), at_a_time))
        groups += [_group(requests, part) for part in parts]
    return groups


def _group(requests: Sequence[Request], numbers: list[int]) -> _Group:
    inputs = [[*requests[number].context, *requests[number].continuation[:-1]] for number in numbers]
    trunk = _Row(_in_common(inputs), 0)
    length = len(trunk.tokens)
    branches: dict[tuple[int, ...], _Row] = {}
    for number, tokens in zip(numbers, inputs, strict=True):
        context, continuation = requests[number]
        rest = tokens[length:]
        branch = branches.setdefault(tuple(rest), _Row(rest, length)) if rest else trunk
        for position, target in enumerate(continuation, start=len(context) - 1):
            row = trunk if position < length else branch
            row.wanted.append((position, target, number))
    return _Group(numbers, trunk, list(branches.values()))


def _batches(groups: list[_Group], max_tokens: int) -> Iterator[_Batch]:
    """Those that begin alike beside each other; and then by length, the longest first."""
    beginnings = [tuple(group.trunk.tokens[:_WORTH_KEEPING]) for group in groups]
    count = Counter(beginnings)

    def place(i: int) -> tuple[object, ...]:
        group, beginning = groups[i], beginnings[i]
        is_common = len(beginning) == _WORTH_KEEPING and count[beginning] >= _WORTH_GATHERING
        return beginning if is_common else (), -len(group.trunk.tokens), -group.longest_branch

    batch = _Batch()
    for i in sorted(range(len(groups)), key=place):
        larger = batch.plus(groups[i])
        if batch.groups and not larger.fits(max_tokens):
            yield batch
            larger = _Batch().plus(groups[i])
        batch = larger
    if batch.groups:
        yield batch


Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # request, log-probability, whether it is the likeliest; by token


@torch.no_grad()
def _compute(model: Decoder, batch: _Batch) -> Iterator[Found]:
    prefix, groups = batch.kept, batch.groups
    rows = [_Row(group.trunk.tokens[len(prefix) :], len(prefix), group.trunk.wanted) for group in groups]
    branches = [branch for group in groups for branch in group.branches]
    cache = KVCache(batch.width + batch.depth) if prefix or branches else None
    if prefix:
        assert cache is not None
        model.hidden(torch.tensor([prefix], device=model.device), cache=cache)
        cache.take([0] * len(rows))
    yield _look_up(model, rows, cache)
    if branches:
        assert cache is not None
        cache.take([i for i, group in enumerate(groups) for _ in group.branches])
        yield _look_up(model, branches, cache)


def _look_up(model: Decoder, rows: list[_Row], cache: KVCache | None) -> Found:
    """Forward the rows, padded on the right, and read what is wanted of them."""
    lengths = [len(row.tokens) for row in rows]
    width = max(lengths)
    tokens = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in rows], device=model.device)
    positions = documents = None
    if cache is not None and cache.length:
        starts = torch.tensor([row.start for row in rows], device=model.device)
        positions = starts[:, None] + torch.arange(width, device=model.device)  # [b, s]
    elif model.config.rope.type == "dynamic":  # it alone looks at the length of a row
        documents = Documents.in_rows([length] for length in lengths).to(model.device)
    hidden = model.hidden(tokens, positions, documents, cache).flatten(0, 1)  # [b * s, d]

    wanted = sorted(
        (i * width + position - row.start, target, number)
        for i, row in enumerate(rows)
        for position, target, number in row.wanted
    )
    places, targets, numbers = np.array(wanted, dtype=np.int64).reshape(-1, 3).T
    places, which = np.unique(places, return_inverse=True)  # several choices may be read at one place
    chunk = max(1, _LOGITS // model.config.vocab_size)
    log_probs, agrees = [], []
    for start in range(0, len(places), chunk):
        here = slice(*np.searchsorted(which, (start, start + chunk)))
        place, target = (torch.from_numpy(part).to(model.device) for part in (which[here] - start, targets[here]))
        of_chunk = torch.from_numpy(places[start : start + chunk]).to(model.device)
        log_softmax = model.head(hidden[of_chunk]).float().log_softmax(-1)  # [c, v]
        log_probs.append(log_softmax[place, target].cpu())
        agrees.append((log_softmax.argmax(-1)[place] == target).cpu())
    return numbers, torch.cat(log_probs).numpy(), torch.cat(agrees).numpy()


def _check(requests: Sequence[Request], max_seq_len: int) -> None:
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError(
                f"Request {number} has {len(context)} tokens of context and {len(continuation)} to score. There must "
                "be one at least of each: give a bos as context, and leave empty continuations out."
            )
        if (length := len(context) + len(continuation) - 1) > max_seq_len:
            raise ValueError(
                f"Request {number} is {length} tokens of input, and the model was built for {max_seq_len} "
                "(max_position_embeddings). Shorten its context."
            )
