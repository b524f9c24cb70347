"""Training steps of a small pair in float64, in any number of processes."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdtune import checkpoint, data, distributed, losses, optim
from kdtune.checkpoint.state import Run
from kdtune.data.batch import without_labels
from kdtune.distributed import ParallelConfig, Ranks
from kdtune.documents import Documents
from kdtune.dtensors import is_spread
from kdtune.generation import generate
from kdtune.models import LoraConfig, QATConfig, enable_activation_checkpointing, trained_parameters
from kdtune.pipeline_parallel import schedule
from kdtune.teacher import (
    LiveTeacher,
    Teacher,
    TeacherConfig,
    add_hidden_loss,
    compare_hidden,
    count_compared,
    run_student,
)

STEPS = 3
Lengths = Sequence[int | tuple[int, ...]]
LENGTHS: Lengths = (5, 31, 2, 17, 9, 24, 3)  # of the rows of a step, which differ much


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
        lengths = torch.tensor([total, total - documents[0] * (len(documents) > 1)])
        made.append(data.Batch(tokens, labels, positions, packed, lengths=lengths))
    return made


@dataclass
class Settings:
    """What a recipe's settings say of what is trained."""

    lora: LoraConfig | None = None
    qat: QATConfig | None = None
    seed: int = 0
    optimizer_in_bwd: bool = False
    student: str = "student"  # or whose model it is
    dtype: torch.dtype = torch.float64
    checkpointer: checkpoint.StartCheckpointerConfig = field(default_factory=checkpoint.StartCheckpointerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teacher_checkpointer: checkpoint.CheckpointerConfig = field(default_factory=checkpoint.CheckpointerConfig)
    hidden_loss: losses.HiddenLossConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


class Training:
    """A pair that is trained, by this process together with the others."""

    def __init__(
        self,
        models: Path,
        parallel: ParallelConfig,
        start: Path | None = None,
        ranks: Ranks | None = None,
        **settings: Any,
    ) -> None:
        self.ranks = ranks or distributed.join(parallel, "cpu")
        if parallel.offload and self.ranks.device.type == "cpu":
            offload_without_a_gpu()
        self.cfg = cfg = Settings(**settings, parallel=parallel)
        cfg.checkpointer.checkpoint_dir = str(models / cfg.student)
        cfg.teacher_checkpointer.checkpoint_dir = str(models / "teacher")
        place = parallel.place(self.ranks.device)
        shard = distributed.sharding(self.ranks, parallel, trains=True)
        self.student = checkpoint.load_start(cfg, start, dtype=cfg.dtype, device=place, shard=shard)
        add_hidden_loss(self.student, cfg, self.ranks)
        size = self.student.config.vocab_size
        shard = distributed.sharding(self.ranks, parallel, trains=False, vocab_size=size)
        place = self.ranks.device if shard is None else place
        teacher = checkpoint.load_model(models / "teacher", dtype=cfg.dtype, device=place, shard=shard)
        self.teacher: Teacher = LiveTeacher(teacher)
        # In float32 a gradient that is hardly more than rounding errors is not to become a whole step.
        eps = 1e-8 if cfg.dtype == torch.float64 else 1e-3
        self.optimizer = optim.build_optimizer(self.student, optim.OptimizerConfig(lr=0.01, eps=eps))
        if cfg.optimizer_in_bwd and self.ranks.size > 1:  # alone it would take a step for each micro-batch
            self.optimizer.step_in_backward()

    def step(self, number: int, lengths: Lengths = LENGTHS) -> list[float]:
        """Loss and gradient norm."""
        micro_batches = rows(number, lengths)
        num_tokens = data.count_labels(micro_batches)
        share = self.ranks.share
        most = -(-len(micro_batches) // share.num_ranks)
        mine = micro_batches[share.rank :: share.num_ranks]
        mine = [share.of(batch) for batch in [*mine, *[without_labels(packed=False)] * (most - len(mine))]]
        num_compared = count_compared(self.student, mine, self.ranks, num_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        waiting = {}
        for direction, i in schedule(self.student, len(mine)):
            if direction == "backward":
                waiting.pop(i).backward()
                continue
            targets = self.teacher(mine[i], self.student.beside.of_teacher if self.student.beside else ())
            batch = mine[i].to(self.ranks.device)
            hidden, captured = run_student(self.student, batch, targets)
            weights = {"ce_weight": 0.5, "kd_weight": 0.5}
            loss = losses.distillation_loss(hidden, self.student.head, batch.labels, num_tokens, targets, **weights)
            distances = compare_hidden(self.student, captured, targets, batch, num_compared)
            if distances is not None:
                loss = losses.add_hidden(loss, distances, 0.5)
            waiting[i] = loss.total
            total += loss.total.detach()
        norm = self.optimizer.clip_grad_norm(None if self.cfg.optimizer_in_bwd else 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [*self.ranks.all_sum(total[None]), norm.item()]


def offload_without_a_gpu() -> None:
    """Let FSDP do in this process what it does of offloading where no GPU is: all but pinning and the copies."""
    from torch.distributed import fsdp

    fsdp.CPUOffloadPolicy = functools.partial(fsdp.CPUOffloadPolicy, pin_memory=False)  # type: ignore


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


def save_pair(oracle: Callable[..., Any], folder: Path, **pair: tuple[str, dict[str, Any]]) -> None:
    """Student and teacher in float64, each given by what `oracle` takes."""
    for role, (name, changes) in pair.items():
        oracle(name, **changes).double().save_pretrained(folder / role)


def say(training: Training, lengths: Lengths, with_logits: bool = True) -> dict[str, Any]:
    """Steps with activations that are computed twice; logits, where rows are whole, and greedy continuations."""
    found: dict[str, Any] = {}
    for mode in ("full", "selective"):
        enable_activation_checkpointing(training.student, mode)
        found[mode] = training.step(1, lengths)
    vocab_size = training.student.config.vocab_size  # a teacher has no more where layers are split
    for role, model in (("student", training.student), ("teacher", training.teacher.model)):
        if with_logits:
            with torch.no_grad():
                found[f"{role} logits"] = model(rows(1)[0].tokens)[..., :vocab_size]
        found[role] = generate(model.eval(), [[5, 3, 8], [7], [11, 2, 9, 4, 30]], max_new_tokens=5)
    return found


def check_same(numbers: dict[str, Any], folder: Path, run: str, other: str) -> None:
    """Of two runs of `train`: what they logged, by name in `numbers`, and the models that they wrote."""
    torch.testing.assert_close(numbers[run], numbers[other], rtol=1e-9, atol=0)
    weights, expected = (
        checkpoint.load_model(folder / name / "model", dtype=torch.float64, device="cpu").state_dict()
        for name in (run, other)
    )
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-12)


def train(
    models: Path,
    parallel: ParallelConfig,
    folder: Path,
    lengths: Lengths = LENGTHS,
    traffic: AbstractContextManager[Any] | None = None,
    **settings: Any,
) -> list[list[float]]:
    """Steps, the last within `traffic`; after the first a checkpoint, at the end the model."""
    training = Training(models, parallel, **settings)
    writer = write(training)
    run = Run(folder, None, writer, optimizer=training.optimizer, **checkpoint.beside(training.student))
    numbers = []
    for run.step in range(1, STEPS + 1):
        with (traffic if run.step == STEPS else None) or nullcontext():
            numbers.append(training.step(run.step, lengths))
        if run.step == 1:
            shutil.copytree(run.save(), folder / "kept") if training.ranks.is_first else run.save()
            training.ranks.wait()
            in_background = run.save(in_background=True)
    run.wait()
    assert contents(in_background) == contents(folder / "kept"), "what training did meanwhile is in no file"
    with torch.no_grad():  # as a validation, which leaves the head gathered, or all weights
        training.student.hidden(torch.arange(4, device=training.ranks.device)[None])
    writer.finish(run, training.cfg.dtype)
    if training.ranks.size > 1:
        trained = trained_parameters(training.student).values()
        assert all(is_spread(parameter) for parameter in trained), "what is saved has its rest"
    return numbers


def contents(folder: Path) -> dict[str, Any]:
    """All bytes of all files of a folder; safetensors writes the entries of a header in any order."""
    found: dict[str, Any] = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        is_headed = path.suffix == ".safetensors"
        found[name] = (json.loads(content[8:end]), content[end:]) if is_headed else content
    return found


def resume(
    models: Path,
    parallel: ParallelConfig,
    start: Path,
    folder: Path,
    lengths: Lengths = LENGTHS,
    **settings: Any,
) -> list[list[float]]:
    """The steps after a checkpoint."""
    training = Training(models, parallel, start=start, **settings)
    parts = {"optimizer": training.optimizer, **checkpoint.beside(training.student)}
    run = Run(folder, start, write(training), **parts)
    return [training.step(step, lengths) for step in range(run.step + 1, STEPS + 1)]


def write(training: Training) -> checkpoint.ModelWriter:
    config = checkpoint.read_config(training.cfg.checkpointer.checkpoint_dir)
    return checkpoint.ModelWriter(training.student, training.cfg, config, {}, training.optimizer.master, training.ranks)
