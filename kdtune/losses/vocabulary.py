"""The vocabulary of a row, whole or split over ranks.

Most of the objective looks at one entry at a time. What it needs to know of the others of a row is little: the
normaliser of a distribution, its largest entry, the logits of a few tokens, and sums. `Whole` takes them from the row.
`Part` has the entries of one rank, and takes them from what ranks have told each other: two numbers for each
distribution, one for each token that is looked up. What is returned of a part is its share of a sum over the ranks.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from kdtune.losses.divergences import Divergence


class Vocabulary:
    """How a tensor-parallel group splits the vocabulary: rank r of n holds entries r * block to (r + 1) * block.

    Both heads are cut at the same entries, since p and q of an entry have to meet: `block` is the larger vocabulary
    divided by n, rounded up, as DTensor's `Shard(0)` cuts it. The last ranks may hold less, or nothing.

    Args:
        group: of the ranks. They call with the same labels and settings.
        size: entries of the student's vocabulary.
        teacher_size: of the teacher's; None: the same, or there is no teacher.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, teacher_size: int | None = None):
        self.group = group
        self.size = size
        self.teacher_size = teacher_size or size
        self.rank, self.ranks = group.rank(), group.size()
        self.block = -(-max(self.size, self.teacher_size) // self.ranks)
        self.start = self.rank * self.block

    def held(self, size: int) -> slice:
        """Which of `size` entries are here: `weight[vocabulary.held(len(weight))]` is this rank's slice of a head."""
        return slice(min(self.start, size), min(self.start + self.block, size))

    def gather(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What every rank has found out about n rows, [ranks, n, w], from what this one has, [n, w]."""
        mine = torch.cat([*found.values()], -1)
        everyones = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(everyones, mine, self.group)
        columns = torch.stack(everyones).split([x.shape[-1] for x in found.values()], -1)
        return dict(zip(found, columns, strict=True))

    def sum(self, share: Tensor) -> Tensor:
        """Of the shares of all ranks, in place."""
        dist.all_reduce(share, group=self.group)
        return share

    def start_sum(self, share: Tensor) -> dist.Work:
        """Begin to add them up; it is done once the returned work has been waited for."""
        return dist.all_reduce(share, group=self.group, async_op=True)


def extent(x: Tensor) -> Tensor:
    """The largest of the entries that are here, and sum exp(x - largest): [r, 2] from [r, any].

    Not the logarithm of sum exp x, from whose size small probabilities would get a rounding error.
    """
    lowest = torch.finfo(x.dtype).min  # not -inf, whose difference to itself is NaN
    largest = x.amax(-1, keepdim=True).clamp(min=lowest) if x.shape[-1] else x.new_full((len(x), 1), lowest)
    return torch.cat([largest, (x - largest).exp().sum(-1, keepdim=True)], -1)


class Whole:
    """All entries are here."""

    def held(self, size: int) -> int:
        """How many of the first `size` entries are here."""
        return size

    def once(self, x: Tensor) -> Tensor:
        """The share of this rank in what all of them have computed."""
        return x

    def log_softmax(self, x: Tensor, name: str) -> Tensor:
        """[r, any]; `name` is of the distribution."""
        return x.log_softmax(-1)

    def logsumexp(self, x: Tensor, name: str, of: str | None = None) -> Tensor:
        """[r, 1]; `of`: `x` are logarithms of this distribution."""
        return x.logsumexp(-1, keepdim=True)

    def max(self, log_p: Tensor, name: str) -> Tensor:
        """[r, 1], of the distribution's logarithms."""
        return log_p.amax(-1, keepdim=True)

    def gather(self, x: Tensor, ids: Tensor) -> Tensor:
        """The shares of `x` at these tokens, [r, k]."""
        return x.gather(-1, ids)

    def look_up(self, log_p: Tensor, ids: Tensor, name: str, of: str) -> Tensor:
        """The distribution's logarithms at these tokens, [r, k], wherever they are."""
        return log_p.gather(-1, ids)

    def leave_out_(self, x: Tensor, ids: Tensor, is_none: Tensor) -> Tensor:
        """Write -inf over these tokens, but for those that are none."""
        # Added, since the ids of those may be of tokens that stay.
        return x.scatter_add_(-1, ids, x.new_full(ids.shape, -torch.inf).masked_fill_(is_none, 0))

    def exponentials_(self, log_p: Tensor, name: str, of: str) -> tuple[Tensor, Tensor, Tensor]:
        """exp(log p - largest) in the place of the logarithms, that largest one, and the sum, [r, 1] each.

        Args:
            log_p: [r, any].
            name: of these entries.
            of: the distribution that they are from.
        """
        largest = log_p.amax(-1, keepdim=True).clamp_(min=torch.finfo(log_p.dtype).min)  # as in `extent`
        exponentials = log_p.sub_(largest).exp_()
        return exponentials, largest, exponentials.sum(-1, keepdim=True)

    def scatter_(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        """One token a row: [r, 1]."""
        x.scatter_(-1, ids, values)

    def scatter_add_(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        x.scatter_add_(-1, ids, values)

    def agree(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether both are largest at the same token, [r]."""
        return x.argmax(-1) == y.argmax(-1)

    def is_largest(self, x: Tensor, ids: Tensor, name: str) -> Tensor:
        """Whether `x` is largest at this token, [r] from [r, any] and [r]."""
        return x.argmax(-1) == ids


class Part:
    """The entries of this rank.

    Args:
        vocabulary: of which it is a part.
        found: by `rows.measure` on every rank, [ranks, r, any].
    """

    def __init__(self, vocabulary: Vocabulary, found: dict[str, Tensor]):
        self.rank, self.start, self.block = vocabulary.rank, vocabulary.start, vocabulary.block
        self.found = found

    def held(self, size: int) -> int:
        return min(max(size - self.start, 0), self.block)

    def once(self, x: Tensor) -> Tensor:
        return x if self.rank == 0 else torch.zeros_like(x)

    def log_softmax(self, x: Tensor, name: str) -> Tensor:
        largest, log_sum = self._extent(name)
        return (x - largest).sub_(log_sum)

    def logsumexp(self, x: Tensor, name: str, of: str | None = None) -> Tensor:
        largest, log_sum = self._extent(name)  # of logits
        return (largest if of is None else self.log_softmax(largest, of)) + log_sum

    def max(self, log_p: Tensor, name: str) -> Tensor:
        return -self._extent(name)[1]

    def gather(self, x: Tensor, ids: Tensor, absent: float = 0.0) -> Tensor:
        if not x.shape[-1]:
            return x.new_full(ids.shape, absent)
        is_held, ids = self._held(x, ids)
        return x.gather(-1, ids).masked_fill(~is_held, absent)

    def look_up(self, log_p: Tensor, ids: Tensor, name: str, of: str) -> Tensor:
        return self.log_softmax(self.found[name].amax(0), of)  # absent ones are -inf

    def leave_out_(self, x: Tensor, ids: Tensor, is_none: Tensor) -> Tensor:
        self.scatter_add_(x, ids, x.new_full(ids.shape, -torch.inf).masked_fill_(is_none, 0))
        return x

    def exponentials_(self, log_p: Tensor, name: str, of: str) -> tuple[Tensor, Tensor, Tensor]:
        largest, log_sum = self._extent(name)  # of logits
        largest = self.log_softmax(largest, of)
        return log_p.sub_(largest).exp_(), largest, log_sum.exp()

    def scatter_(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        if x.shape[-1]:
            is_held, ids = self._held(x, ids)
            x.scatter_(-1, ids, torch.where(is_held, values, x.gather(-1, ids)))

    def scatter_add_(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        if x.shape[-1]:
            is_held, ids = self._held(x, ids)
            x.scatter_add_(-1, ids, torch.where(is_held, values, 0))

    def agree(self, x: Tensor, y: Tensor) -> Tensor:
        if not x.shape[-1]:
            return torch.zeros_like(x.sum(-1), dtype=torch.bool)
        # Of ranks with the same maximum the first has it, as of entries.
        winners = [self.found[name][..., 0].argmax(0) for name in ("shared_student", "shared_teacher")]  # [r] each
        return (winners[0] == self.rank) & (winners[1] == self.rank) & (x.argmax(-1) == y.argmax(-1))

    def is_largest(self, x: Tensor, ids: Tensor, name: str) -> Tensor:
        if not x.shape[-1]:
            return torch.zeros_like(ids, dtype=torch.bool)
        return (self.found[name][..., 0].argmax(0) == self.rank) & (x.argmax(-1) + self.start == ids)

    def _extent(self, name: str) -> tuple[Tensor, Tensor]:
        """The largest entry of the whole row, and log sum exp(x - largest), [r, 1] each."""
        maxima, sums = self.found[name].split(1, -1)  # [ranks, r, 1] each
        largest = maxima.amax(0)
        return largest, (sums * (maxima - largest).exp()).sum(0).log()

    def _held(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each of the tokens has a column in `x`, and which; any for those that have none."""
        ids = ids - self.start
        return (ids >= 0) & (ids < x.shape[-1]), ids.clamp(0, x.shape[-1] - 1)


@functools.cache
def is_sum_over_entries(divergence: Divergence, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a divergence of whole rows is the sum of those of their parts, tried on two rows."""
    angles = torch.arange(16, dtype=dtype, device=device).view(2, 8)
    log_p, log_q = (3 * angles.sin()).log_softmax(-1), (3 * angles.cos()).log_softmax(-1)
    values, slopes = divergence(log_p, log_q)
    parts = [divergence(log_p[:, part], log_q[:, part]) for part in (slice(5), slice(5, None))]
    sums, joined = torch.stack([values for values, _ in parts]).sum(0), torch.cat([slopes for _, slopes in parts], -1)
    return torch.allclose(sums, values, 1e-4, 1e-6) and torch.allclose(joined, slopes, 1e-4, 1e-6)
