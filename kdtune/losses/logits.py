"""Logits of scored positions, some at a time, for what looks at whole rows of them and needs no gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kdtune.losses.chunked import default_chunk_size
from kdtune.losses.projection import Projection
from kdtune.losses.vocabulary import Vocabulary


@torch.no_grad()
def logits_of(
    hidden: Tensor, head: nn.Module, scored: Tensor, chunk_size: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Go through scored positions.

    Args:
        hidden: [..., d], final hidden states, after the last norm.
        head: as `Projection` takes it. Of a tensor-parallel group, all ranks call with the same positions.
        scored: [t] int64, which of the positions, counted through all of them.
        chunk_size: positions whose logits exist at one time; None: `default_chunk_size`.

    Yields:
        Which of the t they are, and [n, v], float32 or wider, of the whole vocabulary on each rank. They may be
        overwritten.
    """
    vocabulary = getattr(head, "vocabulary", None)
    projection = Projection(hidden, head)
    size = projection.vocab_size if vocabulary is None else vocabulary.ranks * vocabulary.block
    step = chunk_size or default_chunk_size(size, size, hidden.device)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    for start in range(0, len(scored), step):
        positions = scored[start : start + step]
        logits = projection.logits(positions, hidden.new_empty(len(positions), projection.vocab_size, dtype=dtype))
        if vocabulary is not None:
            logits = _joined(logits, vocabulary)
        yield slice(start, start + len(positions)), projection.activation.apply(logits)[0]


def _joined(part: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The entries of all ranks, [n, v], from those of this one."""
    padded = part.new_zeros(len(part), vocabulary.block)
    padded[:, : part.shape[-1]] = part
    parts = vocabulary.gather({"logits": padded})["logits"]  # [ranks, n, block]
    return parts.transpose(0, 1).flatten(1)[:, : vocabulary.teacher_size]
