"""Settings of the objective, as recipes offer them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdtune.config import setting
from kdtune.losses.divergences import Divergence, DivergenceName, divergence
from kdtune.losses.targets import Comparison, Convention, check_convention


@dataclass
class KDLossConfig:
    """The divergence between teacher and student."""

    name: DivergenceName = "forward_kl"  # what is minimised; docs/divergences.md says how they differ
    beta: float | None = setting(None, gt=0, lt=1)  # of jsd (the teacher's weight) and symmetric_kl; null: 0.5
    alpha: float | None = setting(None, gt=0, lt=1)  # of skew_forward_kl and skew_reverse_kl; null: 0.1
    weight: float = setting(1.0, ge=0)  # of the divergence in the objective, times kd_ratio
    temperature: float = setting(1.0, gt=0)  # softens both distributions; 1 leaves them as they are
    teacher_temperature: float | None = setting(None, gt=0)  # softens the teacher's instead; null: as temperature
    scale_by_temperature_squared: bool = True  # keeps the gradient's size as the temperature grows
    initial_teacher_share: float = setting(1.0, gt=0, le=1)  # of the target, rising to 1; the student has the rest
    label_margin: float = setting(0.0, ge=0, lt=1)  # move the teacher towards the label, which wins by it (MFT); 0: off
    balance: bool = False  # rescale the divergence to the size of the cross-entropy before they are blended
    top_k_convention: Convention = "bucket"  # what is compared if only a top k is known; docs/divergences.md has all


def build_divergence(cfg: KDLossConfig) -> Divergence:
    """The divergence that these settings name.

    Raises:
        ValueError: a parameter that this divergence does not have.
    """
    try:
        return divergence(cfg.name, beta=cfg.beta, alpha=cfg.alpha)
    except ValueError as error:
        raise ValueError(f"kd_loss.{error}") from None


def check_targets(cfg: KDLossConfig, known: Literal["whole", "top_k", "samples"]) -> None:
    """Refuse settings that do not go with each other, or with what is known of the teacher's distributions.

    Raises:
        ValueError: which, why and what to do.
    """
    if known != "top_k" and cfg.top_k_convention != "bucket":
        raise ValueError(
            f"kd_loss.top_k_convention={cfg.top_k_convention} is about a teacher of which only the top k are known, "
            "which this one is not. Leave it out."
        )
    conventions: dict[str, Comparison | None] = {"top_k": cfg.top_k_convention, "samples": "sampled"}
    function = build_divergence(cfg)
    try:
        check_convention(
            conventions.get(known),
            function,
            temperature=cfg.temperature,
            teacher_temperature=cfg.teacher_temperature or cfg.temperature,
            teacher_share=cfg.initial_teacher_share,
            label_margin=cfg.label_margin,
        )
    except ValueError as error:
        raise ValueError(f"kd_loss: {error}") from None


@dataclass
class CELossConfig:
    """The cross-entropy on the labels."""

    weight: float = setting(1.0, ge=0)  # of the cross-entropy in the objective, times 1 - kd_ratio where there is one
    label_smoothing: float = setting(0.0, ge=0, lt=1)  # share of the uniform distribution in the labels
    z_loss: float = setting(0.0, ge=0)  # weight of log(sum exp logits)^2, which keeps logits small; 0: off
