"""How much memory and disk a run will need, computed from the shapes before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdtune.models import ModelConfig, num_parameters


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for; the largest of them live at the same time, in the student's backward."""

    student: int  # weights
    gradients: int
    optimizer: int  # two moments
    teacher: int  # weights
    activations: int  # of the student, kept for the backward
    loss: int  # chunks of logits, the heads in float32 and the gradient of the student's head

    @property
    def total(self) -> int:
        return self.student + self.gradients + self.optimizer + self.teacher + self.activations + self.loss

    def __str__(self) -> str:
        parts = ("student", "gradients", "optimizer", "teacher", "activations", "loss")
        listed = ", ".join(f"{part} {format_bytes(getattr(self, part))}" for part in parts if getattr(self, part))
        return f"{format_bytes(self.total)} ({listed})"


def estimate(
    student: ModelConfig,
    teacher: ModelConfig | None,
    *,
    dtype: torch.dtype,
    batch_size: int,
    seq_len: int,
    activation_checkpointing: bool,
    loss_chunk_size: int,
) -> Estimate:
    """Peak memory of a training step with AdamW, every row as long as `seq_len`.

    Left out: the allocator's fragmentation, the libraries' own workspace, and on the CPU the process itself.
    """
    size = dtype.itemsize
    weights = num_parameters(student) * size
    return Estimate(
        student=weights,
        gradients=weights,
        optimizer=2 * weights,
        teacher=0 if teacher is None else num_parameters(teacher) * size,
        activations=batch_size * seq_len * _activations_per_token(student, size, activation_checkpointing),
        loss=_loss_bytes(student, teacher, size, loss_chunk_size),
    )


def disk(student: ModelConfig, dtype: torch.dtype, save_dtype: torch.dtype, keeps_checkpoints: bool) -> int:
    """Bytes on the disk at most: the finished model, and two checkpoints while the newer replaces the older."""
    weights = num_parameters(student)
    checkpoint = 3 * weights * dtype.itemsize  # with the optimizer's two moments
    return weights * save_dtype.itemsize + (2 * checkpoint if keeps_checkpoints else 0)


def format_bytes(count: float) -> str:
    """1610612736 -> '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _activations_per_token(cfg: ModelConfig, size: int, checkpointing: bool) -> int:
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    norm = 4 + 2 * size  # an entry's input in float32, its output before and after the weight
    layer = 2 * cfg.hidden_size * norm
    layer += size * (2 * queries + 2 * keys) + 4 * cfg.num_heads  # q, k, v, attention's output and its log-sum-exp
    layer += size * 4 * cfg.intermediate_size  # gate, its activation, up, their product
    if cfg.qk_norm:
        layer += (4 + size) * (queries + keys)  # the rotation keeps nothing, so there is no output after the weight
    last = (4 + size) * cfg.hidden_size
    if checkpointing:  # each layer keeps its input; one layer at a time is computed again
        return cfg.num_layers * size * cfg.hidden_size + layer + last
    return cfg.num_layers * layer + last


def _loss_bytes(student: ModelConfig, teacher: ModelConfig | None, size: int, chunk: int) -> int:
    # In float32 whatever the models are in. Of a chunk: logits, log-probabilities and gradient of the student; with a
    # teacher one more of the student, and logits, log-probabilities and probabilities of the teacher.
    blocks = 3 * student.vocab_size if teacher is None else 4 * student.vocab_size + 3 * teacher.vocab_size
    total = 4 * chunk * blocks
    head = student.vocab_size * student.hidden_size
    if size == 4:
        return total + 4 * head  # the gradient of the student's head
    casts = head + (0 if teacher is None else teacher.vocab_size * teacher.hidden_size)
    return total + 4 * casts + (4 + size) * head  # summed in float32, then rounded
