"""A teacher that is asked during training."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from kdtune.data import Batch
from kdtune.dtensors import is_spread
from kdtune.losses import Targets, distillation_loss
from kdtune.models import Decoder, compile_layers, stream_layers


class LiveTeacher:
    """A frozen model."""

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

    def compile(self) -> None:
        """Its layers, as those of the student."""
        compile_layers(self.model)

    def follow(self, loader: object) -> None:
        """Nothing: what it will be asked need not be known before."""

    def __call__(self, batch: Batch, wanted: Collection[str] = ()) -> Targets:
        """The distributions of each position, on the student's device.

        Args:
            batch: anywhere.
            wanted: modules whose outputs are asked for as well, of those in `module_names`.
        """
        batch = batch.to(self.device)
        with self._without_gradients():
            hidden, captured = self.model.hidden_states(batch.tokens, batch.positions, batch.documents, wanted)
        # Copied: what was made in inference mode cannot be kept for a backward, as a loss of one's own may want to.
        device = self.head.weight.device
        copies = {name: captured.pop(name).to(device, copy=True) for name in list(captured)}
        return Targets(hidden.to(device, copy=True), self.head, copies)

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
