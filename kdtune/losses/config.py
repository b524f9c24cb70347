"""Settings of the objective, as recipes offer them."""

from __future__ import annotations

from dataclasses import dataclass

from kdtune.config import setting
from kdtune.losses.divergences import Divergence, DivergenceName, divergence


@dataclass
class KDLossConfig:
    """The divergence between teacher and student."""

    name: DivergenceName = "forward_kl"  # what is minimised; docs/divergences.md says how they differ
    beta: float | None = setting(None, gt=0, lt=1)  # of jsd (the teacher's weight) and symmetric_kl; null: 0.5
    alpha: float | None = setting(None, gt=0, lt=1)  # of skew_forward_kl and skew_reverse_kl; null: 0.1
    temperature: float = setting(1.0, gt=0)  # softens both distributions; 1 leaves them as they are
    scale_by_temperature_squared: bool = True  # keeps the gradient's size as the temperature grows
    initial_teacher_share: float = setting(1.0, gt=0, le=1)  # of the target, rising to 1; the student has the rest
    label_margin: float = setting(0.0, ge=0, lt=1)  # move the teacher towards the label, which wins by it (MFT); 0: off
    balance: bool = False  # rescale the divergence to the size of the cross-entropy before they are blended


def build_divergence(cfg: KDLossConfig) -> Divergence:
    """The divergence that these settings name.

    Raises:
        ValueError: a parameter that this divergence does not have.
    """
    try:
        return divergence(cfg.name, beta=cfg.beta, alpha=cfg.alpha)
    except ValueError as error:
        raise ValueError(f"kd_loss.{error}") from None


@dataclass
class CELossConfig:
    """The cross-entropy on the labels."""

    label_smoothing: float = setting(0.0, ge=0, lt=1)  # share of the uniform distribution in the labels
    z_loss: float = setting(0.0, ge=0)  # weight of log(sum exp logits)^2, which keeps logits small; 0: off
