"""How much memory a run will need, computed from the shapes before anything is loaded."""

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

    def disk(self, keeps_checkpoints: bool) -> int:
        """Bytes on the disk at most: the finished model, and two checkpoints while the newer replaces the older."""
        return self.student + (2 * (self.student + self.optimizer) if keeps_checkpoints else 0)

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


def format_bytes(count: float) -> str:
    """1610612736 -> '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _activations_per_token(cfg: ModelConfig, size: int, checkpointing: bool) -> int:
    attention, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    # Residual stream in, norm's float32 copy and output, q and k before and after the rotation, v, attention's output
    # and its log-sum-exp, residual, norm's float32 copy and output, gate, its activation, up, their product.
    layer = size * (4 * cfg.hidden_size + 3 * attention + 3 * kv + 4 * cfg.intermediate_size)
    layer += 4 * (2 * cfg.hidden_size + cfg.num_heads)
    last = (size + 4) * cfg.hidden_size
    if checkpointing:  # each layer keeps its input; one layer at a time is computed again
        return cfg.num_layers * size * cfg.hidden_size + layer + last
    return cfg.num_layers * layer + last


def _loss_bytes(student: ModelConfig, teacher: ModelConfig | None, size: int, chunk: int) -> int:
    heads = [student] if teacher is None else [student, teacher]
    # In float32 whatever the models are in: five blocks of the student's chunk, three of the teacher's.
    blocks = sum(4 * n * chunk * cfg.vocab_size for n, cfg in zip((3, 3), heads, strict=False))
    casts = 0 if size == 4 else sum(4 * cfg.vocab_size * cfg.hidden_size for cfg in heads)
    return blocks + casts + (4 + size) * student.vocab_size * student.hidden_size
