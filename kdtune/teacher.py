"""Whatever answers "what would the teacher say here"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdtune import devices
from kdtune.config import setting
from kdtune.data import Batch
from kdtune.dtensors import is_spread
from kdtune.losses import Targets, distillation_loss
from kdtune.models import Decoder, ModelConfig, Quantization, check_quantization, stream_layers


@dataclass
class TeacherConfig:
    """How the teacher is held; none of it changes the student."""

    dtype: devices.Dtype | None = None  # of its weights and activations; null: as the student's
    device: str | None = setting(None)  # where it computes, such as cuda:1 or cpu; null: beside the student
    quantization: Quantization | None = None  # store its layers' weights in few bits; null: as they are
    compare_quantization: bool = False  # before training, print how far quantisation moved its predictions
    offload: bool = False  # its layers stay in host memory, and come to the device one ahead of the computation

    def place(self, device: torch.device) -> torch.device:
        """Where it computes if the student is on `device`; in a plan, that is `meta` for a GPU."""
        if self.device is None:
            return device
        if device.type == "meta":
            return torch.device("cpu") if torch.device(self.device).type == "cpu" else device
        return devices.resolve(self.device, "teacher.device")


def check_teacher(cfg: TeacherConfig, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what cannot be done with this teacher, or would change nothing.

    Args:
        cfg: how it is to be held.
        config: its architecture.
        dtype: of its weights.
        device: where it computes.

    Raises:
        ValueError: says what, and what to do.
    """
    if cfg.quantization is not None:
        check_quantization(cfg.quantization, config, dtype=dtype, device=device, setting="teacher.quantization")
    elif cfg.compare_quantization:
        raise ValueError(
            "teacher.compare_quantization=true compares the quantised teacher with the full one, and "
            "teacher.quantization is null. Set it, or leave the comparison out."
        )
    if cfg.offload and device.type == "cpu":
        raise ValueError(
            "teacher.offload=true keeps the teacher's layers in the host's memory, and on the CPU they are there. "
            "Leave it out."
        )


class LiveTeacher:
    """A frozen model that is asked during training."""

    def __init__(
        self, model: Decoder, *, student_device: torch.device | None = None, offload_to: torch.device | None = None
    ):
        """Take a model as it was loaded.

        Args:
            model: on the device where it computes, or, to be offloaded, in host memory.
            student_device: where the loss wants hidden states and head; None: where the model computes. If that is
                elsewhere, the head is copied: logits would be far more to move.
            offload_to: where it computes while its layers stay in host memory; None: where it is.
        """
        self.model = model.requires_grad_(False).eval()
        if offload_to is not None:
            stream_layers(model, offload_to)
        self.device = model.device
        # What FSDP gathers into is used again, outside of inference mode, too.
        self._without_gradients = torch.no_grad if any(map(is_spread, model.parameters())) else torch.inference_mode
        self.head = model.head
        # The device of a tensor has its number, which `cuda` leaves out.
        wanted = self.device if student_device is None else torch.empty(0, device=student_device).device
        if wanted != self.device:
            vocab_size, hidden_size = model.head.weight.shape
            self.head = nn.Linear(hidden_size, vocab_size, bias=False, device="meta")
            self.head.weight = nn.Parameter(model.head.weight.to(wanted), requires_grad=False)

    def __call__(self, batch: Batch) -> Targets:
        """The distributions of each position, on the student's device; `batch` may be anywhere."""
        batch = batch.to(self.device)
        with self._without_gradients():
            hidden = self.model.hidden(batch.tokens, batch.positions, batch.documents)  # [b, s, d]
        # Copied: what was made in inference mode cannot be kept for a backward, as a loss of one's own may want to.
        return Targets(hidden.to(self.head.weight.device, copy=True), self.head)

    def compare(self, full_hidden: Tensor, batch: Batch, chunk_size: int | None) -> str:
        """In words, how far this teacher's predictions are from those that it made before it was quantised.

        Args:
            full_hidden: [b, s, d], its last hidden states of `batch` then; the head is never quantised.
            batch: anywhere.
            chunk_size: of the loss.
        """
        batch = batch.to(full_hidden.device)
        found = distillation_loss(
            self(batch).hidden,
            self.head,
            batch.labels,
            batch.num_labels,
            Targets(full_hidden, self.head),
            scored=batch.scored,
            chunk_size=chunk_size,
            with_metrics=True,
        )
        return (
            f"KL(full, quantised) {found.kd:.2g}, ce {found.ce:.3f} (full: {found.teacher_ce:.3f}), "
            f"top-1 agreement {found.agreement:.1%}"
        )

    def judge(self, ce: float, source: str) -> str:
        """In words, what the teacher's cross-entropy of some text says about its weights.

        A teacher that was loaded wrongly teaches noise, and no loss would show it.

        Args:
            ce: in nats per token.
            source: where the weights came from, to name it.

        Returns:
            The cross-entropy beside that of a uniform guess, and a warning if it is hardly better.
        """
        uniform = math.log(self.model.config.vocab_size)
        found = f"ce {ce:.3f} (a uniform guess: {uniform:.3f})"
        # Fresh weights come out a little above or below the guess. Written so that NaN is called out, too.
        if ce < 0.95 * uniform:
            return found
        return (
            f"{found}\nWARNING: the teacher predicts the labels no better than a uniform guess, so a student learns "
            f"noise from it. Is {source} trained, and for this kind of text?"
        )
