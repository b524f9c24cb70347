"""What the teacher says at each position, whole or in part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Convention = Literal["bucket", "renormalised", "partial", "student_full"]


@dataclass(frozen=True)
class Targets:
    """The teacher's next-token distributions, as the hidden states and the head that produce them.

    Attributes:
        hidden: [b, s, d_t], after the teacher's final norm.
        head: its output projection, weight [v_t, d_t]. Nothing of the teacher receives a gradient.
    """

    hidden: Tensor
    head: nn.Module


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's k most likely next tokens.

    What is compared with the student is a convention, and tools that call it "top-k KL" differ in it:

    * `bucket`: k tokens and one bucket for all others, the rest of the probability on both sides. Any divergence of
      these k + 1 outcomes is one: at least 0, and at most that of the whole distributions.
    * `renormalised`: both distributions restricted to the k tokens (NeMo-Aligner, NeMo-RL, Model Optimizer's top-k).
      What the student gives to other tokens does not count.
    * `student_full`: the teacher restricted to the k tokens, the student over all (DistillKit, NeMo-RL with
      `zero_outside_topk`). Forward KL only.
    * `partial`: the sum over the k tokens of the whole distributions' terms (Megatron-LM without its ghost token). Not
      a divergence: it can be negative. Forward KL only.

    Attributes:
        ids: [b, s, k], tokens of the student's vocabulary, none of them twice in a row.
        log_probs: [b, s, k], log p at temperature 1 over the whole vocabulary.
        log_rest: [b, s], log of the probability of all other tokens; None: of 1 - sum p, which is right however p was
            rounded. Only `bucket` reads it.
        convention: one of the above.
        vocab_size: entries of the teacher's vocabulary, if the student's has padding beyond it; None: the same.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor | None = None
    convention: Convention = "bucket"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise ValueError(f"convention={self.convention}: known are {', '.join(get_args(Convention))}.")
        if self.ids.shape != self.log_probs.shape:
            raise ValueError(f"ids are {list(self.ids.shape)}, log_probs {list(self.log_probs.shape)}.")

    def flat(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`ids` and `log_probs` [b * s, k] and `log_rest` [b * s, 1], logarithms in `dtype`."""
        log_probs = self.log_probs.flatten(0, -2).to(dtype)
        if self.log_rest is None:
            log_rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1))
        else:
            log_rest = self.log_rest.flatten()[:, None].to(dtype)
        return self.ids.flatten(0, -2), log_probs, log_rest
