"""The element-wise part of the objective: rows of logits in, sums of their losses out, and the gradient in their place.

Nothing here knows of models, chunks or devices. What crosses the vocabulary are maxima and sums per row. Where a rank
has only some of the entries, `measure` finds its share of them, to be exchanged, and `score` then returns its share of
the sums; of the gradient one product is left, with a sum over the vocabulary that has to be exchanged as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtune.losses.divergences import Divergence
from kdtune.losses.targets import Comparison
from kdtune.losses.vocabulary import Part, Vocabulary, Whole, extent

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

    def of(self, x: Tensor) -> Tensor:
        """Logits; `x` stays as it is."""
        return x if self.cap is None and self.scale == 1 else self.apply(x.clone())[0]


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows; `distillation_loss` says what each of them means."""

    divergence: Divergence
    temperature: float  # of the student in the divergence
    teacher_temperature: float
    kd_scale: float
    mixes_student: bool  # into the target
    label_margin: float
    label_smoothing: float
    z_loss: float
    student_activation: Activation
    teacher_activation: Activation
    convention: Comparison | None  # of a teacher's tokens; None: logits, or no teacher
    vocab_size: int  # of the student, over all ranks
    shared_size: int  # of both, over all ranks
    vocabulary: Vocabulary | None  # how ranks split it; None: all of it is here
    with_metrics: bool
    with_grad: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        for name, is_right, why in (
            ("temperature", self.temperature > 0, "logits are divided by it, so it must be positive"),
            ("teacher_temperature", self.teacher_temperature > 0, "logits are divided by it, so it must be positive"),
            ("label_margin", 0 <= self.label_margin < 1, "the label wins by it, from 0 (off) to below 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share of the labels, from 0 (off) to below 1"),
            ("z_loss", self.z_loss >= 0, "a weight, from 0 (off)"),
        ):
            if not is_right:
                raise ValueError(f"{name}={getattr(self, name)}: {why}.")

    @property
    def has_own_softmax(self) -> bool:
        """Whether the divergence softens the student's logits or leaves some out; else q is as in the cross-entropy.

        A softened top k is among its tokens alone.
        """
        if self.convention == "renormalised":
            return False
        return self.shared_size < self.vocab_size or (self.temperature != 1 and self.convention is None)


@dataclass
class _Term:
    """The divergence of some rows, and what it adds to the gradient of the student's logits z.

    Attributes:
        value: [], the sum over the rows.
        pull: [r, 1], to be subtracted from the weight of q = softmax(z).
        dense: [r, <= v], to be added to the gradient of the first entries, if any.
        sparse: (ids, [r, k]), to be added to the gradient of these entries, if any.
        scaled: ([r, s], [r, 1]), whose product is the gradient of the first s entries, the cross-entropy's in it but
            for the label; None: the weight of q makes it.
        unsettled_pull: [r, 1], this rank's share of a pull, if other ranks have the others.
        unsettled_q: [r, <= v], what the pull is of then; None: of q.
    """

    value: Tensor
    pull: Tensor | float = 0.0
    dense: Tensor | None = None
    sparse: tuple[Tensor, Tensor] | None = None
    scaled: tuple[Tensor, Tensor] | None = None
    unsettled_pull: Tensor | None = None
    unsettled_q: Tensor | None = None


def outcomes(teacher: tuple[Tensor, ...], settings: Settings) -> tuple[Tensor, ...]:
    """What `measure` and `score` take of sparse targets, from what their `flat` makes.

    Of all positions at once: a GPU takes longer to start operations on few numbers than to carry them out.

    Returns:
        ids [t, k] that can be looked up, any for what is no token; which are none, [t, k]; log p of the outcomes that
        are compared, [t, k] or [t, k + 1], or the weights of draws, [t, k], and entropies, [t, 1]; what metrics need.
    """
    ids, numbers, of_position, *metrics = teacher
    is_teachers_own = ids >= settings.shared_size
    is_none = (ids < 0) | is_teachers_own
    ids = ids.masked_fill(is_none, 0).long()
    if settings.convention == "sampled":
        return ids, is_none, numbers.masked_fill(is_none, 0), of_position, *metrics
    log_p = numbers.masked_fill(is_none, _LOG_ZERO)
    if settings.convention in ("bucket", "partial"):
        # As of whole distributions, those that only the teacher has are no outcome, and all others add up to 1.
        mass = numbers.exp().masked_fill(~is_teachers_own, 0).sum(-1, keepdim=True)
        log_both = torch.log1p(-mass.clamp(max=1 - torch.finfo(numbers.dtype).eps))
        log_p, of_position = log_p - log_both, of_position - log_both
    if settings.convention == "renormalised":
        log_p = (log_p / settings.teacher_temperature).log_softmax(-1)
    elif settings.convention == "student_full":
        log_p = log_p.log_softmax(-1).masked_fill(is_none, _LOG_ZERO)
    elif settings.convention == "bucket":
        # Of an empty rest, 1 - sum p is rounding.
        is_all = (~is_none).sum(-1, keepdim=True) == settings.shared_size
        log_p = torch.cat([log_p, of_position.masked_fill(is_all, _LOG_ZERO)], -1)
    return ids, is_none, log_p.clamp(min=_LOG_ZERO), *metrics


def measure(
    logits: Tensor, teacher: tuple[Tensor, ...], labels: Tensor, teacher_share: Tensor, settings: Settings
) -> dict[str, Tensor]:
    """What other ranks have to know of the entries that are here, by the names under which `score` looks for it.

    Arguments are those of `score`, and stay as they are.

    Returns:
        The `extent` of each distribution, [r, 2], and logits of tokens, [r, 1] or [r, k], -inf for those elsewhere.
    """
    assert settings.vocabulary is not None
    part = Part(settings.vocabulary, {})
    logits = settings.student_activation.of(logits)  # [r, v]
    found = {"student": extent(logits)}
    if not teacher:
        return found
    if settings.convention is None:
        teacher_logits = settings.teacher_activation.of(*teacher)
        shared = min(logits.shape[-1], teacher_logits.shape[-1])
        logits, teacher_logits = logits[:, :shared], teacher_logits[:, :shared]
        if settings.with_metrics:
            found["shared_student"], found["shared_teacher"] = extent(logits), extent(teacher_logits)
        if settings.mixes_student:
            teacher_logits = _mixed(logits, teacher_logits, teacher_share)
        if settings.temperature != 1:
            logits = logits / settings.temperature
        if settings.teacher_temperature != 1:
            teacher_logits = teacher_logits / settings.teacher_temperature
        found["p"] = extent(teacher_logits)
        if settings.label_margin:
            found["label"] = part.gather(teacher_logits, labels.clamp(max=settings.shared_size - 1), absent=-torch.inf)
    else:
        logits = logits[:, : part.held(settings.shared_size)]
        ids, is_none, *_ = teacher
        found["tokens"] = part.gather(logits, ids, absent=-torch.inf)
        if settings.with_metrics:
            found["shared_student"] = extent(logits)
        if settings.convention == "bucket":
            found["others"] = extent(part.leave_out_(logits.clone(), ids, is_none))
    if settings.has_own_softmax and settings.convention != "bucket":
        found["q"] = extent(logits)
    return found


def score(
    logits: Tensor,
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    weights: Tensor,
    teacher_share: Tensor,
    settings: Settings,
    found: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Sum the losses of the rows, and write the gradient of their weighted sum over the logits.

    Args:
        logits: [r, v], the student's, before the activation; overwritten.
        teacher: (logits [r, v_t],), overwritten; or what `outcomes` makes of sparse targets; or ().
        labels: [r, 1].
        weights: [2], of the cross-entropy and of the divergence.
        teacher_share: [], of the teacher in the target, if `settings.mixes_student`.
        settings: the same for all rows.
        found: by `measure` on every rank, [ranks, r, any]; nothing if all of the vocabulary is here.

    Returns:
        [7], in the order of `SUMS`, unweighted; of a part of the vocabulary, its share of them. And None, or what is
        left to do for the gradient: [r, 1], to be added up over ranks, multiplied with what is then in the teacher's
        logits, and subtracted.
    """
    entries = Whole() if settings.vocabulary is None else Part(settings.vocabulary, found)
    ce_weight, kd_weight = weights
    logits, activation_slope = settings.student_activation.apply(logits)
    log_q = entries.log_softmax(logits, "student")  # [r, v]
    label_log_q = entries.gather(log_q, labels)  # [r, 1]
    ce = ce_objective = -label_log_q.sum()
    q_weight = ce_weight
    if settings.label_smoothing:
        mean_log_q = log_q.sum(-1) / settings.vocab_size  # [r]
        ce_objective = (1 - settings.label_smoothing) * ce - settings.label_smoothing * mean_log_q.sum()
    if settings.z_loss:
        log_z = entries.logsumexp(logits, "student")  # [r, 1]
        ce_objective = ce_objective + settings.z_loss * entries.once(log_z.square().sum())
        q_weight = ce_weight * (1 + 2 * settings.z_loss * log_z)

    metrics = [torch.zeros_like(ce)] * 4
    if not teacher:
        kd = _Term(torch.zeros_like(ce))
    elif settings.convention is None:
        teacher_logits, _ = settings.teacher_activation.apply(*teacher)
        if settings.with_metrics:
            metrics = _metrics(logits, log_q, teacher_logits, labels, settings, entries)
        if settings.mixes_student:
            teacher_logits = _mixed(logits, teacher_logits, teacher_share)
        kd = _dense_divergence(logits, log_q, teacher_logits, labels, kd_weight, settings, entries)
    else:
        if settings.with_metrics:
            metrics = _sparse_metrics(logits, log_q, teacher, settings, entries)
        kd = _sparse_divergence(log_q, teacher, q_weight, kd_weight, settings, entries)

    if settings.with_grad:
        # d CE / d logits = q - onehot(label)
        if kd.scaled is None:
            q = log_q.exp_()
            grad = torch.mul(q, q_weight - kd.pull, out=logits)
        else:
            q, scale = kd.scaled
            grad, shared = logits, q.shape[-1]
            torch.mul(q, scale, out=grad[:, :shared])
            torch.mul(log_q[:, shared:].exp_(), q_weight, out=grad[:, shared:])
        if kd.dense is not None:
            grad[:, : kd.dense.shape[-1]] += kd.dense
        if kd.sparse is not None:
            entries.scatter_add_(grad, *kd.sparse)
        entries.scatter_add_(grad, labels, (-(1 - settings.label_smoothing) * ce_weight).expand(labels.shape))
        if settings.label_smoothing:
            grad -= ce_weight * (settings.label_smoothing / settings.vocab_size)
        if activation_slope is not None:
            grad *= activation_slope
        if kd.unsettled_pull is not None:
            q = q if kd.unsettled_q is None else kd.unsettled_q
            left = teacher[0][:, : q.shape[-1]].copy_(q)
            if activation_slope is not None:
                left *= activation_slope[:, : q.shape[-1]] if isinstance(activation_slope, Tensor) else activation_slope
    return torch.stack([ce_objective, ce, kd.value, *metrics]), kd.unsettled_pull


def _mixed(logits: Tensor, teacher_logits: Tensor, teacher_share: Tensor) -> Tensor:
    """Of student and teacher, over the entries that both have."""
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    return teacher_share * teacher_logits[:, :shared] + (1 - teacher_share) * logits[:, :shared]


def _dense_divergence(
    logits: Tensor,
    log_q: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    kd_weight: Tensor,
    settings: Settings,
    entries: Whole | Part,
) -> _Term:
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    student_logits, teacher_logits = logits[:, :shared], teacher_logits[:, :shared]
    if settings.has_own_softmax:
        log_q = entries.log_softmax(student_logits / settings.temperature, "q")
    log_q = log_q.clamp_(min=_LOG_ZERO)
    log_p = teacher_logits if settings.teacher_temperature == 1 else teacher_logits / settings.teacher_temperature
    log_p = entries.log_softmax(log_p, "p").clamp_(min=_LOG_ZERO)  # [r, shared]
    if settings.label_margin:
        _correct(log_p, labels, settings, entries)

    value, slopes, pull = _weighted(*settings.divergence(log_p, log_q), kd_weight, settings)
    if not settings.with_grad:
        return _Term(value)
    q = log_q.exp_() if settings.has_own_softmax else None
    if isinstance(entries, Part):
        return _Term(value, dense=slopes, unsettled_pull=pull, unsettled_q=q)
    if q is None:
        return _Term(value, pull, dense=slopes)
    return _Term(value, dense=slopes.addcmul_(q, pull, value=-1))


def _sparse_divergence(
    log_q: Tensor,
    teacher: tuple[Tensor, ...],
    q_weight: Tensor,
    kd_weight: Tensor,
    settings: Settings,
    entries: Whole | Part,
) -> _Term:
    """Of sparse targets. The outcomes that are compared are few, [r, k] or [r, k + 1]; q reaches further.

    The first entries of `log_q`, those that both vocabularies have, are overwritten.
    """
    ids, is_none, *_ = teacher
    log_q = log_q[:, : entries.held(settings.shared_size)]
    # As of a token that neither side ever says, which adds 0 to whatever is computed.
    top_log_q = entries.look_up(log_q, ids, "tokens", "student").masked_fill(is_none, _LOG_ZERO)  # [r, k]
    log_shared = None  # of the student's probability of entries that both have, [r, 1]; None: it has no others
    if settings.convention == "renormalised":
        top_log_q = (top_log_q / settings.temperature).log_softmax(-1)
    elif settings.convention == "bucket":
        # Not 1 - sum q: of a small rest nothing would be left but rounding. The entries are left out in place, and not
        # looked at again: the gradient of those that remain is their share in the rest times one number a row.
        entries.leave_out_(log_q, ids, is_none)
        share, largest, total = entries.exponentials_(log_q, "others", "student")  # [r, s], [r, 1], [r, 1]
        top_log_q = torch.cat([top_log_q, (total.log() + largest).clamp_(min=_LOG_ZERO)], -1)
        if settings.has_own_softmax:
            log_shared = top_log_q.logsumexp(-1, keepdim=True)
            largest = largest - log_shared
    elif settings.has_own_softmax:
        log_shared = entries.logsumexp(log_q, "q", "student")
    if log_shared is not None:
        top_log_q = top_log_q - log_shared
    top_log_q = top_log_q.clamp(min=_LOG_ZERO)

    # Every rank has these outcomes, so that their sums are not shares.
    value, slopes, pull = _weighted(*_compare(teacher, top_log_q, settings), kd_weight, settings)
    value = entries.once(value)
    if not settings.with_grad:
        return _Term(value)
    if settings.convention == "renormalised":
        return _Term(value, sparse=(ids, slopes - top_log_q.exp() * pull), scaled=(log_q.exp_(), q_weight))
    # Of q among the shared entries, in which all is written from here on.
    weight = (q_weight if log_shared is None else q_weight * log_shared.exp()) - pull
    if settings.convention == "bucket":
        top_q, rest_slopes = top_log_q[:, :-1].exp(), slopes[:, -1:]
        # At least 1, unless the rest is empty: no overflow, however little of q it has.
        scale = largest.exp() * weight + rest_slopes / total.clamp(min=1)
        return _Term(value, sparse=(ids, top_q * weight + slopes[:, :-1]), scaled=(share, scale))
    q = log_q.exp_() if log_shared is None else log_q.sub_(log_shared).exp_()
    return _Term(value, sparse=(ids, slopes), scaled=(q, weight))


def _compare(teacher: tuple[Tensor, ...], log_q: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The divergence of the outcomes, [r], and its slopes, [r, n], from the student's log q of them, [r, n]."""
    numbers = teacher[2]
    if settings.convention == "sampled":
        return -teacher[3][:, 0] - (numbers * log_q).sum(-1), -numbers
    if settings.convention in ("partial", "student_full"):
        # q does not add up to 1 here: its multiples would not cancel, so the slope has to be the forward KL's own.
        p = numbers.exp()
        return (p * (numbers - log_q)).sum(-1), -p
    return settings.divergence(numbers, log_q)


def _weighted(values: Tensor, slopes: Tensor, kd_weight: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of all rows, [], its slopes as they weigh in the objective, [r, n], and their sums, [r, 1]."""
    value = values.masked_fill(values > _INFINITE, torch.inf).sum() * settings.kd_scale
    if settings.with_grad:
        slopes = slopes * (kd_weight * (settings.kd_scale / settings.temperature))
    return value, slopes, slopes.sum(-1, keepdim=True)


def _correct(log_p: Tensor, labels: Tensor, settings: Settings, entries: Whole | Part) -> None:
    """Move the teacher towards the label, in place, by as little as makes it win by the margin.

    Not where it does not know the label.
    """
    margin = settings.label_margin
    is_known = labels < settings.shared_size
    labels = labels.clamp(max=settings.shared_size - 1)
    p_label, p_max = entries.look_up(log_p, labels, "label", "p").exp(), entries.max(log_p, "p").exp()  # [r, 1]
    wrong = (p_max - p_label + margin) / (1 + p_max - p_label)
    right = (p_label + margin).clamp(max=1) - p_label
    right = right / (1 - p_label).clamp(min=torch.finfo(p_label.dtype).tiny)
    share = torch.where(p_label < p_max, wrong, right) * is_known  # of the label's one-hot distribution in the mixture
    log_p += torch.log1p(-share).clamp(min=_LOG_ZERO)
    entries.scatter_(log_p, labels, (p_label + share * (1 - p_label)).log())
    log_p.clamp_(min=_LOG_ZERO)


def _metrics(
    logits: Tensor, log_q: Tensor, teacher_logits: Tensor, labels: Tensor, settings: Settings, entries: Whole | Part
) -> list[Tensor]:
    """Sums of the student's entropy, the teacher's cross-entropy and entropy, and of agreements; at temperature 1."""
    shared = min(logits.shape[-1], teacher_logits.shape[-1])
    log_p = entries.log_softmax(teacher_logits[:, :shared], "shared_teacher")
    agree = entries.agree(logits[:, :shared], log_p)
    teacher_ce = -entries.gather(log_p, labels.clamp(max=settings.shared_size - 1)).sum()
    student_entropy, teacher_entropy = (torch.special.entr(x.exp()).sum() for x in (log_q, log_p))
    return [student_entropy, teacher_ce, teacher_entropy, agree.sum().to(log_q.dtype)]


def _sparse_metrics(
    logits: Tensor, log_q: Tensor, teacher: tuple[Tensor, ...], settings: Settings, entries: Whole | Part
) -> list[Tensor]:
    """The same, where the targets say what the teacher's are."""
    entropy, ce, top_ids = teacher[-3:]
    agree = entries.is_largest(logits[:, : entries.held(settings.shared_size)], top_ids[:, 0], "shared_student")
    student_entropy = torch.special.entr(log_q.exp()).sum()
    return [student_entropy, *(entries.once(x.sum()) for x in (ce, entropy)), agree.sum().to(log_q.dtype)]
