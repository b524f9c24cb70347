"""How much memory and disk a run will need, computed from the shapes before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kdtune import losses, optim
from kdtune.models import LoraConfig, ModelConfig, num_parameters, trained_shapes


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for; the largest of them live at the same time, in the student's backward."""

    student: int  # weights
    gradients: int
    optimizer: int  # its state
    teacher: int  # weights
    activations: int  # of the student, kept for the backward
    loss: int  # a chunk of both models' logits, and the gradient of the student's head

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
    optimizer: optim.OptimizerConfig,
    optimizer_in_bwd: bool,
    gradient_accumulation_steps: int,
    batch_size: int,
    seq_len: int,
    activation_checkpointing: bool,
    loss_chunk_size: int | None,
    device: torch.device,
    packed: bool = False,
) -> Estimate:
    """Peak memory of a training step, every row as long as `seq_len`, of several documents if `packed`.

    Left out: the allocator's fragmentation, the libraries' own workspace, and on the CPU the process itself.
    """
    size = dtype.itemsize
    count = num_parameters(student)
    # Of all weights, in float32 if they are sums; or of the largest matrix, and then of the next.
    gradients = student.vocab_size * student.hidden_size * size if optimizer_in_bwd else count * size
    if gradient_accumulation_steps > 1:
        gradients = 4 * count
    per_token = _activations_per_token(student, size, activation_checkpointing)
    if packed and device.type != "cpu" and size == 4:
        # Without the kernel for documents of any length, attention's output is kept by the document and by the row.
        layers = 1 if activation_checkpointing else student.num_layers
        per_token += layers * size * student.num_heads * student.head_dim
    return Estimate(
        student=count * size,
        gradients=gradients,
        optimizer=0 if optimizer.offload else int(count * optim.bytes_per_weight(optimizer, dtype)),
        teacher=0 if teacher is None else num_parameters(teacher) * size,
        activations=batch_size * seq_len * per_token,
        loss=_loss_bytes(student, teacher, size, loss_chunk_size, batch_size * seq_len, device),
    )


def disk(
    student: ModelConfig,
    dtype: torch.dtype,
    save_dtype: torch.dtype,
    optimizer: optim.OptimizerConfig,
    keeps_checkpoints: bool,
    lora: LoraConfig | None = None,
) -> int:
    """Bytes on the disk at most: what is finished, and two checkpoints while the newer replaces the older."""
    count = num_parameters(student)
    model = count * save_dtype.itemsize
    if lora is not None:
        count, dtype = sum(map(math.prod, trained_shapes(student, lora).values())), torch.float32
        model = model * lora.save_merged + count * dtype.itemsize
    checkpoint = int(count * (dtype.itemsize + optim.bytes_per_weight(optimizer, dtype)))
    return model + (2 * checkpoint if keeps_checkpoints else 0)


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


def _loss_bytes(
    student: ModelConfig,
    teacher: ModelConfig | None,
    size: int,
    chunk: int | None,
    num_tokens: int,
    device: torch.device,
) -> int:
    # In float32 whatever the models are in: a chunk of both models' logits, the gradient of the student's head, and
    # temporaries of some rows.
    teacher_vocab_size = 0 if teacher is None else teacher.vocab_size
    chunk = min(chunk or losses.default_chunk_size(student.vocab_size, teacher_vocab_size, device), num_tokens)
    logits = 4 * chunk * (student.vocab_size + teacher_vocab_size)
    rows = 6 * 4 * min(losses.block_rows(student.vocab_size, device), chunk) * student.vocab_size
    head = student.vocab_size * student.hidden_size
    if size == 4:
        return logits + rows + 4 * head
    # The gradient of the logits is rounded for its products; the head's is rounded at the end, when logits are gone.
    return 4 * head + max(logits + max(rows, size * chunk * student.vocab_size), size * head)
