"""The element-wise part of the objective: rows of logits in, sums of their losses out, and the gradient in their place.

Nothing here knows of models, chunks or devices. What crosses the vocabulary are maxima and sums per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtune.losses.divergences import Divergence
from kdtune.losses.targets import Convention

_LOG_ZERO = -1e38  # instead of -inf, so that 0 * log 0 is 0
_INFINITE = 1e12  # a divergence beyond it has met log 0 where the other distribution is not 0

# What `score` sums over its rows. The first is what is trained on: with label smoothing and z-loss, if any.
SUMS = ("ce_objective", "ce", "kd", "student_entropy", "teacher_ce", "teacher_entropy", "agreement")


@dataclass(frozen=True)
class Activation:
    """What a head does with its products: logits = scale * x, or cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor | float | None]:
        """Logits, written over `x`, and d logits / dx; None: 1."""
        if self.cap is not None:
            ratio = x.mul_(self.scale / self.cap).tanh_()
            slope = (1 - ratio.square()).mul_(self.scale)
            return ratio.mul_(self.cap), slope
        if self.scale != 1:
            return x.mul_(self.scale), self.scale
        return x, None


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows; `distillation_loss` says what each of them means."""

    divergence: Divergence
    temperature: float
    kd_scale: float
    mixes_student: bool  # into the target
    label_margin: float
    label_smoothing: float
    z_loss: float
    student_activation: Activation
    teacher_activation: Activation
    convention: Convention | None  # of a teacher's top k; None: logits, or no teacher
    teacher_vocab_size: int | None  # of a teacher's top k; None: the student's
    with_metrics: bool
    with_grad: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        for name, is_right, why in (
            ("temperature", self.temperature > 0, "both distributions are divided by it, so it must be positive"),
            ("label_margin", 0 <= self.label_margin < 1, "the label wins by it, from 0 (off) to below 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share of the labels, from 0 (off) to below 1"),
            ("z_loss", self.z_loss >= 0, "a weight, from 0 (off)"),
        ):
            if not is_right:
                raise ValueError(f"{name}={getattr(self, name)}: {why}.")


@dataclass
class _Term:
    """The divergence of some rows, and what it adds to the gradient of the student's logits z.

    Attributes:
        value: [], the sum over the rows.
        pull: [r, 1], to be subtracted from the weight of q = softmax(z).
        dense: [r, <= v], to be added to the gradient of the first entries, if any.
        sparse: (ids, [r, k]), to be added to the gradient of these entries, if any.
    """

    value: Tensor
    pull: Tensor | float = 0.0
    dense: Tensor | None = None
    sparse: tuple[Tensor, Tensor] | None = None


def score(
    logits: Tensor,
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    weights: Tensor,
    teacher_share: Tensor,
    settings: Settings,
) -> Tensor:
    """Sum the losses of the rows, and write the gradient of their weighted sum over the logits.

    Args:
        logits: [r, v], the student's, before the activation; overwritten.
        teacher: (logits [r, v_t],), overwritten; or (ids, log_probs [r, k], log_rest [r, 1]); or ().
        labels: [r, 1].
        weights: [2], of the cross-entropy and of the divergence.
        teacher_share: [], of the teacher in the target, if `settings.mixes_student`.
        settings: the same for all rows.

    Returns:
        [7], in the order of `SUMS`, unweighted.
    """
    ce_weight, kd_weight = weights
    logits, activation_slope = settings.student_activation.apply(logits)
    log_q = logits.log_softmax(-1)  # [r, v]
    label_log_q = log_q.gather(-1, labels)  # [r, 1]
    ce = ce_objective = -label_log_q.sum()
    q_weight = ce_weight
    if settings.label_smoothing:
        ce_objective = (1 - settings.label_smoothing) * ce - settings.label_smoothing * log_q.mean(-1).sum()
    if settings.z_loss:
        log_z = logits.logsumexp(-1, keepdim=True)  # [r, 1]
        ce_objective = ce_objective + settings.z_loss * log_z.square().sum()
        q_weight = ce_weight * (1 + 2 * settings.z_loss * log_z)

    metrics = [torch.zeros_like(ce)] * 4
    if not teacher:
        kd = _Term(torch.zeros_like(ce))
    elif settings.convention is None:
        teacher_logits, _ = settings.teacher_activation.apply(*teacher)
        if settings.with_metrics:
            metrics = _metrics(logits, log_q, teacher_logits, labels)
        if settings.mixes_student:
            shared = min(logits.shape[-1], teacher_logits.shape[-1])
            teacher_logits = teacher_share * teacher_logits[:, :shared] + (1 - teacher_share) * logits[:, :shared]
        kd = _dense_divergence(logits, log_q, teacher_logits, labels, kd_weight, settings)
    else:
        kd = _sparse_divergence(logits, log_q, teacher, kd_weight, settings)

    if settings.with_grad:
        # d CE / d logits = q - onehot(label)
        grad = torch.mul(log_q.exp_(), q_weight - kd.pull, out=logits)
        if kd.dense is not None:
            grad[:, : kd.dense.shape[-1]] += kd.dense
        if kd.sparse is not None:
            grad.scatter_add_(-1, *kd.sparse)
        grad.scatter_add_(-1, labels, (-(1 - settings.label_smoothing) * ce_weight).expand(labels.shape))
        if settings.label_smoothing:
            grad -= ce_weight * (settings.label_smoothing / grad.shape[-1])
        if activation_slope is not None:
            grad *= activation_slope
    return torch.stack([ce_objective, ce, kd.value, *metrics])


def _dense_divergence(
    logits: Tensor, log_q: Tensor, teacher_logits: Tensor, labels: Tensor, kd_weight: Tensor, settings: Settings
) -> _Term:
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    student_logits, teacher_logits = logits[:, :shared], teacher_logits[:, :shared]
    # At temperature 1 and over the same entries the student's distribution is that of the cross-entropy.
    same = settings.temperature == 1 and shared == log_q.shape[-1]
    log_q = log_q if same else (student_logits / settings.temperature).log_softmax(-1)
    log_q = log_q.clamp_(min=_LOG_ZERO)
    log_p = teacher_logits if settings.temperature == 1 else teacher_logits / settings.temperature
    log_p = log_p.log_softmax(-1).clamp_(min=_LOG_ZERO)  # [r, shared]
    if settings.label_margin:
        _correct(log_p, labels, settings.label_margin)

    value, slopes, pull = _weighted(*settings.divergence(log_p, log_q), kd_weight, settings)
    if not settings.with_grad:
        return _Term(value)
    if same:
        return _Term(value, pull, dense=slopes)
    return _Term(value, dense=slopes.addcmul_(log_q.exp_(), pull, value=-1))


def _sparse_divergence(
    logits: Tensor, log_q: Tensor, top_k: tuple[Tensor, ...], kd_weight: Tensor, settings: Settings
) -> _Term:
    """Of the teacher's top k. The outcomes that are compared are few, [r, k] or [r, k + 1]; q reaches further."""
    ids, log_p, log_rest = top_k
    shared = settings.teacher_vocab_size or log_q.shape[-1]
    same = shared == log_q.shape[-1]
    log_q = log_q if same else logits[:, :shared].log_softmax(-1)
    if settings.convention == "renormalised":
        log_p = (log_p / settings.temperature).log_softmax(-1)
        top_log_q = (log_q.gather(-1, ids) / settings.temperature).log_softmax(-1).clamp_(min=_LOG_ZERO)  # [r, k]
    else:
        top_log_q = log_q.gather(-1, ids).clamp_(min=_LOG_ZERO)  # [r, k]
    if settings.convention == "student_full":
        log_p = log_p.log_softmax(-1)
    if settings.convention == "bucket":
        # Not 1 - sum q: of a small rest nothing would be left but rounding. And of an empty one 1 - sum p is no more.
        others_log_q = log_q.scatter(-1, ids, -torch.inf)  # [r, v]
        log_q_rest = others_log_q.logsumexp(-1, keepdim=True).clamp_(min=_LOG_ZERO)  # [r, 1]
        if ids.shape[-1] == log_q.shape[-1]:
            log_rest = torch.full_like(log_rest, _LOG_ZERO)
        log_p = torch.cat([log_p, log_rest], -1)
        top_log_q = torch.cat([top_log_q, log_q_rest], -1)
    log_p = log_p.clamp(min=_LOG_ZERO)

    if settings.convention in ("partial", "student_full"):
        # q does not add up to 1 here: its multiples would not cancel, so the slope has to be the forward KL's own.
        p = log_p.exp()
        values, slopes = (p * (log_p - top_log_q)).sum(-1), -p
    else:
        values, slopes = settings.divergence(log_p, top_log_q)
    value, slopes, pull = _weighted(values, slopes, kd_weight, settings)
    if not settings.with_grad:
        return _Term(value)
    if settings.convention == "renormalised":
        return _Term(value, sparse=(ids, slopes - top_log_q.exp() * pull))
    if settings.convention == "bucket":
        # The bucket pulls on each of its entries by their share in it. The share is made of logarithms, and for these
        # entries alone: it can be a small number divided by a smaller one, which must not be added and taken back.
        others = others_log_q.sub_(log_q_rest).exp_().mul_(slopes[:, -1:])
        if not same:
            others.addcmul_(log_q.exp_(), pull, value=-1)
        return _Term(value, pull if same else 0.0, dense=others, sparse=(ids, slopes[:, :-1]))
    if not same:
        return _Term(value, dense=log_q.exp_().mul_(-pull), sparse=(ids, slopes))
    return _Term(value, pull, sparse=(ids, slopes))


def _weighted(values: Tensor, slopes: Tensor, kd_weight: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of all rows, [], its slopes as they weigh in the objective, [r, n], and their sums, [r, 1]."""
    value = values.masked_fill(values > _INFINITE, torch.inf).sum() * settings.kd_scale
    if settings.with_grad:
        slopes = slopes * (kd_weight * (settings.kd_scale / settings.temperature))
    return value, slopes, slopes.sum(-1, keepdim=True)


def _correct(log_p: Tensor, labels: Tensor, margin: float) -> None:
    """Move the teacher towards the label, in place, by as little as makes it win by `margin`.

    Not where it does not know the label.
    """
    is_known = labels < log_p.shape[-1]
    labels = labels.clamp(max=log_p.shape[-1] - 1)
    p_label, p_max = log_p.gather(-1, labels).exp(), log_p.amax(-1, keepdim=True).exp()  # [r, 1]
    wrong = (p_max - p_label + margin) / (1 + p_max - p_label)
    right = (p_label + margin).clamp(max=1) - p_label
    right = right / (1 - p_label).clamp(min=torch.finfo(p_label.dtype).tiny)
    share = torch.where(p_label < p_max, wrong, right) * is_known  # of the label's one-hot distribution in the mixture
    log_p += torch.log1p(-share).clamp(min=_LOG_ZERO)
    log_p.scatter_(-1, labels, (p_label + share * (1 - p_label)).log())
    log_p.clamp_(min=_LOG_ZERO)


def _metrics(logits: Tensor, log_q: Tensor, teacher_logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Sums of the student's entropy, the teacher's cross-entropy and entropy, and of agreements; at temperature 1."""
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    log_p = teacher_logits[:, :shared].log_softmax(-1)
    agree = logits[:, :shared].argmax(-1) == log_p.argmax(-1)
    teacher_ce = -log_p.gather(-1, labels.clamp(max=shared - 1)).sum()
    student_entropy, teacher_entropy = (torch.special.entr(x.exp()).sum() for x in (log_q, log_p))
    return [student_entropy, teacher_ce, teacher_entropy, agree.sum().to(log_q.dtype)]
