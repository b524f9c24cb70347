"""One rank's place in a pipeline, and how tensors get from stage to stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Stage:
    """One rank's place among those that have the layers of a model, and how it passes tensors on.

    Attributes:
        index: its number; the first has the embedding, the last the head, and so the loss.
        count: how many there are.
    """

    def __init__(self, onward: dist.ProcessGroup, back: dist.ProcessGroup) -> None:
        """
        Args:
            onward: the ranks of all stages in their order; what goes on to the next stage goes through it.
            back: the same for gradients. A second group, since what crosses within one on a GPU waits for each other.
        """
        self.index, self.count = onward.rank(), onward.size()
        self._onward, self._back = onward, back
        self._under_way: list[tuple[dist.Work, Tensor]] = []  # what is being sent, which must not be freed

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def send(self, x: Tensor, *, back: bool = False) -> None:
        """To the next stage, or `back` to the one before. Does not wait until it is there."""
        self._under_way = [(work, sent) for work, sent in self._under_way if not work.is_completed()]
        # Gloo's are completed once they are waited for (torch 2.13). Within a step no stage is as far ahead as this.
        if len(self._under_way) > 4 * (self.count + 1):
            self._under_way.pop(0)[0].wait()
        x = x.contiguous()
        group, peer = (self._back, self.index - 1) if back else (self._onward, self.index + 1)
        work = dist.isend(x, group=group, group_dst=peer)
        assert work is not None
        self._under_way.append((work, x))

    def receive(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Fill `x` with what the stage before sends, or the next one sends `back`."""
        group, peer = (self._back, self.index + 1) if back else (self._onward, self.index - 1)
        dist.recv(x, group=group, group_src=peer)
        return x

    def finish(self) -> None:
        """Wait until all that was sent is there."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def gather(self, one: Any) -> list[Any]:
        """What each stage has, in their order; plain numbers and containers."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, one, group=self._onward)
        return found

    def share_last(self, x: Tensor) -> Tensor:
        """What the last stage has, on every one: `x` is what it is there, and is filled elsewhere."""
        dist.broadcast(x, group=self._onward, group_src=self.count - 1)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Over all stages, in place."""
        dist.all_reduce(x, group=self._onward)
        return x

    def add_other_end(self, x: Tensor) -> None:
        """Add to `x` of the first stage that of the last, and the other way round; both have the sum then."""
        other, peer = torch.empty_like(x), self.count - 1 - self.index
        # One after the other: two ends that both send first would wait for each other on a GPU.
        if self.is_first:
            dist.send(x, group=self._onward, group_dst=peer)
        dist.recv(other, group=self._onward, group_src=peer)
        if self.is_last:
            dist.send(x, group=self._onward, group_dst=peer)
        x += other
