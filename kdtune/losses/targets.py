"""What the teacher says at each position, whole or in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from kdtune.losses.divergences import Divergence, forward_kl

Convention = Literal["bucket", "renormalised", "partial", "student_full"]
Comparison = Convention | Literal["sampled"]  # of a part of the teacher's distribution with the student's


@dataclass(frozen=True)
class Targets:
    """The teacher's next-token distributions, as the hidden states and the head that produce them.

    Attributes:
        hidden: [b, s, d_t], after the teacher's final norm; or [t, d_t], of the labelled positions alone, in order.
        head: its output projection, weight [v_t, d_t]. Nothing of the teacher receives a gradient.
        captured: what modules of the teacher that were asked for put out, by name; of the same positions, or of those
            of this rank (see `HiddenLoss`).
    """

    hidden: Tensor
    head: nn.Module
    captured: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> torch.Size:
        """[b, s], or [t]."""
        return self.hidden.shape[:-1]


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

    All of it is [b, s, ...], or [t, ...] of the labelled positions alone, in order.

    Attributes:
        ids: [b, s, k] or [t, k], tokens, none of them twice in a row. -1, or one that the student's vocabulary does not
            have, is no token, so that rows may have less than k.
        log_probs: the same shape, log p at temperature 1 over the whole vocabulary.
        log_rest: [b, s] or [t], log of the probability of all other tokens; None: of 1 - sum p, which is right however
            p was rounded. Only `bucket` reads it.
        convention: one of the above.
        vocab_size: entries of the teacher's vocabulary, if the student's has padding beyond it; None: the same.
        entropy: [b, s] or [t], of the whole distribution at temperature 1. Only metrics need it, and what follows.
        label_log_probs: [b, s] or [t], log p of the label.
        top_ids: [b, s] or [t], the teacher's most likely token; None: of `ids`.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor | None = None
    convention: Convention = "bucket"
    vocab_size: int | None = None
    entropy: Tensor | None = None
    label_log_probs: Tensor | None = None
    top_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if self.convention not in get_args(Convention):
            raise ValueError(f"convention={self.convention}: known are {', '.join(get_args(Convention))}.")
        _check_shapes(self, "log_probs", ("log_rest", "entropy", "label_log_probs", "top_ids"))

    @property
    def positions(self) -> torch.Size:
        """[b, s], or [t]."""
        return self.ids.shape[:-1]

    def flat(self, dtype: torch.dtype, with_metrics: bool = False) -> tuple[Tensor, ...]:
        """`ids` and `log_probs`, [t, k], and `log_rest`, [t, 1]; with metrics, what they need. Numbers are `dtype`."""
        log_probs = self.log_probs.flatten(0, -2).to(dtype)
        if self.log_rest is None:
            is_token = self.ids.flatten(0, -2) >= 0
            log_rest = torch.log1p(-(log_probs.exp() * is_token).sum(-1, keepdim=True).clamp(max=1))
        else:
            log_rest = _column(self.log_rest, dtype)
        top_ids = self.top_ids
        if with_metrics and top_ids is None:
            top_ids = self.ids.gather(-1, self.log_probs.argmax(-1, keepdim=True))
        metrics = _of_metrics(self, top_ids, dtype) if with_metrics else ()
        return self.ids.flatten(0, -2), log_probs, log_rest, *metrics


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from the teacher's distribution p, weighted so that their expectation is p.

    - entropy - sum w log q is then an unbiased estimate of the forward KL, sum p (log p - log q), and so is its
    gradient: over many positions the student learns all of p, with the tail that no top k has. Each of n draws from r
    weighs p / (n r); r = p gives 1 / n (Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge
    Distillation in LLMs", arXiv:2503.16870). An estimate can be below 0.

    All of it is [b, s, ...], or [t, ...] of the labelled positions alone, in order.

    Attributes:
        ids: [b, s, n] or [t, n], tokens. -1, or one that the student's vocabulary does not have, is no token.
        weights: the same shape. Their sum is 1 in expectation, and not made to be 1.
        entropy: [b, s] or [t], of the whole distribution p.
        vocab_size: entries of the teacher's vocabulary, if the student's has padding beyond it; None: the same.
        label_log_probs: [b, s] or [t], log p of the label. Only metrics need it, and `top_ids`.
        top_ids: [b, s] or [t], the teacher's most likely token.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    vocab_size: int | None = None
    label_log_probs: Tensor | None = None
    top_ids: Tensor | None = None
    convention: ClassVar[Literal["sampled"]] = "sampled"

    def __post_init__(self) -> None:
        _check_shapes(self, "weights", ("entropy", "label_log_probs", "top_ids"))

    @property
    def positions(self) -> torch.Size:
        """[b, s], or [t]."""
        return self.ids.shape[:-1]

    def flat(self, dtype: torch.dtype, with_metrics: bool = False) -> tuple[Tensor, ...]:
        """`ids` and `weights`, [t, n], and `entropy`, [t, 1]; with metrics, what they need. Numbers are `dtype`."""
        metrics = _of_metrics(self, self.top_ids, dtype) if with_metrics else ()
        return self.ids.flatten(0, -2), self.weights.flatten(0, -2).to(dtype), _column(self.entropy, dtype), *metrics


SparseTargets = TopKTargets | SampledTargets


def _check_shapes(targets: SparseTargets, numbers: str, of_positions: tuple[str, ...]) -> None:
    shapes = {numbers: targets.ids.shape} | dict.fromkeys(of_positions, targets.positions)
    for name, shape in shapes.items():
        x = getattr(targets, name)
        if x is not None and x.shape != shape:
            raise ValueError(f"ids are {list(targets.ids.shape)}, {name} {list(x.shape)} instead of {list(shape)}.")


def _of_metrics(targets: SparseTargets, top_ids: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's entropies, cross-entropies and most likely tokens, [t, 1] each."""
    entropy, label_log_probs = targets.entropy, targets.label_log_probs
    if entropy is None or label_log_probs is None or top_ids is None:
        raise ValueError(
            "Metrics compare with the teacher's whole distribution, of which these targets have to tell its entropy, "
            "label_log_probs and top_ids."
        )
    return _column(entropy, dtype), _column(-label_log_probs, dtype), _column(top_ids, torch.int64)


def _column(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.flatten()[:, None].to(dtype)


def check_convention(
    convention: Comparison | None,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    teacher_share: float = 1.0,
    label_margin: float = 0.0,
) -> None:
    """Refuse a comparison that is not defined for what is known of the teacher.

    Args:
        convention: of `TopKTargets`; or of `SampledTargets`; None: the whole distribution is known.
        divergence: and the rest: as in `distillation_loss`.

    Raises:
        ValueError: what, why and what to do.
    """
    temperatures = f"temperature={temperature}"
    if teacher_temperature != temperature:
        temperatures += f", teacher_temperature={teacher_temperature}"
    if convention is None:
        if teacher_share != 1 and teacher_temperature != temperature:
            raise ValueError(
                f"{temperatures}: a target between teacher and student is made of logits at one temperature. Leave "
                "teacher_temperature out, or let all of the target be the teacher's."
            )
        return
    known = "a sample" if convention == "sampled" else "its top k"
    if teacher_share != 1 or label_margin != 0:
        raise ValueError(f"teacher_share and label_margin need the teacher's whole distribution, not {known}.")
    if convention == "sampled":
        if divergence is not forward_kl:
            raise ValueError(
                "Sampled targets: defined for forward_kl only. Its gradient is linear in the teacher's probabilities, "
                "so that draws estimate it without bias; no other divergence's is. Take forward_kl, or a top k."
            )
        if temperature != 1 or teacher_temperature != 1:
            raise ValueError(f"{temperatures}: draws at temperature 1 do not tell what is likely at another. Take 1.")
        return
    if convention in ("partial", "student_full") and divergence is not forward_kl:
        raise ValueError(f"Top-k targets, {convention}: defined for forward_kl only. Take bucket.")
    if convention != "renormalised" and (temperature != 1 or teacher_temperature != 1):
        raise ValueError(
            f"{temperatures}: the top k at temperature 1 do not tell what the others have at another. Take temperature "
            "1, or the convention renormalised."
        )
