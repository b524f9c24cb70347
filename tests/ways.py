"""Ways to make a model compute the same by other means."""

from __future__ import annotations

from kdtune.models import Decoder, compile_layers, enable_activation_checkpointing


def plain(model: Decoder) -> None: ...


def checkpointed(model: Decoder) -> None:
    enable_activation_checkpointing(model)


def selective(model: Decoder) -> None:
    enable_activation_checkpointing(model, "selective")


def offloaded(model: Decoder) -> None:
    enable_activation_checkpointing(model, offload=True)


def compiled(model: Decoder) -> None:
    compile_layers(model, backend="eager")


WAYS = (checkpointed, selective, offloaded, compiled)
