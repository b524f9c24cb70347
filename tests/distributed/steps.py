"""Training steps of a small pair in float64, in any number of processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdtune import checkpoint, data, distributed, losses, optim
from kdtune.checkpoint.state import Run
from kdtune.data.batch import without_labels
from kdtune.distributed import ParallelConfig
from kdtune.documents import Documents
from kdtune.dtensors import is_spread
from kdtune.teacher import LiveTeacher

STEPS = 3
Lengths = Sequence[int | tuple[int, ...]]
LENGTHS: Lengths = (5, 31, 2, 17, 9, 24, 3, 11, 30, 7, 13)  # of the rows of a step, which differ much


def rows(step: int, lengths: Lengths = LENGTHS) -> list[data.Batch]:
    """Micro-batches of two rows, each of one length, with a prompt that is not scored.

    Of several lengths, these are the documents of the first row; the second has all but one.
    """
    generator = torch.Generator().manual_seed(step)
    made = []
    for length in lengths:
        documents = (length,) if isinstance(length, int) else length
        total = sum(documents)
        tokens, labels = (torch.randint(97, (2, total), generator=generator) for _ in range(2))
        labels[:, : total // 3] = data.IGNORE
        packed, positions = None, torch.arange(total).expand(2, total)
        if len(documents) > 1:
            packed = Documents.in_rows([documents, documents[1:]])
            positions = packed.positions()
            labels[1, total - documents[0] :] = data.IGNORE
        made.append(data.Batch(tokens, labels, positions, packed))
    return made


class Training:
    """A pair that is trained, by this process together with the others."""

    def __init__(self, models: Path, parallel: ParallelConfig, start: Path | None = None, **settings: Any) -> None:
        self.ranks = distributed.join(parallel, "cpu")
        load = {"dtype": torch.float64, "device": self.ranks.device}
        shard = distributed.sharding(self.ranks, parallel, trains=True)
        self.student = checkpoint.load_model(start or models / "student", **load, shard=shard)
        size = self.student.config.vocab_size
        shard_teacher = distributed.sharding(self.ranks, parallel, trains=False, vocab_size=size)
        self.teacher = LiveTeacher(checkpoint.load_model(models / "teacher", **load, shard=shard_teacher))
        self.optimizer = optim.build_optimizer(self.student, optim.OptimizerConfig(lr=0.01, **settings))

    def step(self, number: int, lengths: Lengths = LENGTHS) -> list[float]:
        """Loss and gradient norm."""
        micro_batches = rows(number, lengths)
        num_tokens = data.count_labels(micro_batches)
        mine = micro_batches[self.ranks.data_rank :: self.ranks.num_data_ranks]
        most = -(-len(micro_batches) // self.ranks.num_data_ranks)
        mine += [without_labels(packed=False)] * (most - len(mine))
        mine = [self.ranks.share.of(batch) for batch in mine]
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(mine):
            targets = self.teacher(batch)
            hidden = self.student.hidden(batch.tokens, batch.positions, batch.documents)
            weights = {"ce_weight": 0.5, "kd_weight": 0.5}
            loss = losses.distillation_loss(hidden, self.student.head, batch.labels, num_tokens, targets, **weights)
            distributed.sync_gradients(self.student, is_last=i == len(mine) - 1)
            loss.total.backward()
            total += loss.total.detach()
        norm = self.optimizer.clip_grad_norm(0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [*self.ranks.all_sum(total[None]), norm.item()]


class Traffic(TorchDispatchMode):
    """Bytes of the whole tensors that are gathered, of those that are reduced and scattered, and that are exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.scattered = self.exchanged = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::_allgather_base_":  # (output, input, ...)
            self.gathered += args[0].nbytes
        if func.name() == "c10d::_reduce_scatter_base_":
            self.scattered += args[1].nbytes
        if func.name() == "c10d::alltoall_base_":
            self.exchanged += args[1].nbytes
        return func(*args, **(kwargs or {}))


def train(models: Path, parallel: ParallelConfig, folder: Path, lengths: Lengths = LENGTHS) -> list[list[float]]:
    """Steps, after the first a checkpoint, at the end the model."""
    training = Training(models, parallel)
    writer = save(training, models)
    run = Run(folder, None, writer, training.ranks, optimizer=training.optimizer)
    numbers = []
    for run.step in range(1, STEPS + 1):
        numbers.append(training.step(run.step, lengths))
        if run.step == 1:
            shutil.copytree(run.save(), folder / "kept") if training.ranks.is_first else run.save()
    with torch.no_grad():  # as a validation, which leaves the head gathered, or all weights
        training.student.hidden(torch.arange(4)[None])
    run.finish(writer)
    if training.ranks.size > 1:
        assert all(is_spread(parameter) for parameter in training.student.parameters()), "what is saved has its rest"
    return numbers


def resume(
    models: Path, parallel: ParallelConfig, start: Path, folder: Path, lengths: Lengths = LENGTHS
) -> list[list[float]]:
    """The steps after a checkpoint."""
    training = Training(models, parallel, start=start)
    run = Run(folder, start, save(training, models), training.ranks, optimizer=training.optimizer)
    return [training.step(step, lengths) for step in range(run.step + 1, STEPS + 1)]


def save(training: Training, models: Path) -> Callable[[Path], None]:
    config = checkpoint.read_config(models / "student")
    rank = {"rank": training.ranks.rank, "num_ranks": training.ranks.size}
    return lambda folder: checkpoint.save_model(training.student, folder, config=config, **rank)
