"""Training steps of a small pair in float64, in any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdtune import checkpoint, data, distributed, losses, optim
from kdtune.data.batch import without_labels
from kdtune.distributed import ParallelConfig
from kdtune.teacher import LiveTeacher

LENGTHS = (5, 31, 2, 17, 9, 24, 3, 11, 30, 7, 13)  # of the rows of a step, which differ much


def rows(step: int) -> list[data.Batch]:
    """Micro-batches of two rows, each of one length, with a prompt that is not scored."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for length in LENGTHS:
        tokens, labels = (torch.randint(97, (2, length), generator=generator) for _ in range(2))
        labels[:, : length // 3] = data.IGNORE
        made.append(data.Batch(tokens, labels, torch.arange(length).expand(2, length)))
    return made


class Training:
    """A pair that is trained, by this process together with the others."""

    def __init__(self, models: Path, parallel: ParallelConfig, start: Path | None = None, **settings: Any) -> None:
        self.ranks = distributed.join(parallel, "cpu")
        load = {"dtype": torch.float64, "device": self.ranks.device}
        shard, shard_teacher = (distributed.sharding(self.ranks, parallel, trains=trains) for trains in (True, False))
        self.student = checkpoint.load_model(start or models / "student", **load, shard=shard)
        self.teacher = LiveTeacher(checkpoint.load_model(models / "teacher", **load, shard=shard_teacher))
        self.optimizer = optim.build_optimizer(self.student, optim.OptimizerConfig(lr=0.01, **settings))

    def step(self, number: int) -> list[float]:
        """Loss and gradient norm."""
        micro_batches = rows(number)
        num_tokens = data.count_labels(micro_batches)
        mine = micro_batches[self.ranks.data_rank :: self.ranks.num_data_ranks]
        most = -(-len(micro_batches) // self.ranks.num_data_ranks)
        mine += [without_labels(packed=False)] * (most - len(mine))
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(mine):
            targets = self.teacher(batch)
            hidden = self.student.hidden(batch.tokens, batch.positions)
            weights = {"ce_weight": 0.5, "kd_weight": 0.5}
            loss = losses.distillation_loss(hidden, self.student.head, batch.labels, num_tokens, targets, **weights)
            distributed.sync_gradients(self.student, is_last=i == len(mine) - 1)
            loss.total.backward()
            total += loss.total.detach()
        norm = self.optimizer.clip_grad_norm(0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [*self.ranks.all_sum(total[None]), norm.item()]
