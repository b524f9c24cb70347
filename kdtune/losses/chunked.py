"""The objective, a chunk of labelled positions at a time.

Logits are the largest tensors of a distillation step: `[tokens, vocabulary]` in float32 for student and teacher,
several times over once autograd keeps what it needs. Here they exist for one chunk at a time. Each chunk is projected
once per model, its losses are computed and the gradient of its logits put in their place (rows.py), which is at once
multiplied into the gradients of the hidden states and of the head (projection.py). So memory does not grow with the
number of tokens, and the arithmetic is that of the products: one of the teacher and three of the student.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdtune.losses import rows
from kdtune.losses.divergences import Divergence, forward_kl
from kdtune.losses.projection import Gradients, Projection
from kdtune.losses.targets import SparseTargets, Targets, check_convention
from kdtune.losses.vocabulary import Vocabulary, is_sum_over_entries

IGNORE = -100  # label of a position that is not scored: prompt, padding, the end of a document


@dataclass(frozen=True)
class Loss:
    """The objective of one micro-batch; every value is a sum over its labelled tokens divided by `num_tokens`.

    Attributes:
        total: what is trained on, the only value that carries a graph.
        ce: cross-entropy of the student against the labels, in nats, at temperature 1, without smoothing or z-loss.
        kd: divergence to the teacher in nats, times temperature squared if asked; 0 without a teacher.
        kd_factor: what `balance` multiplied `kd` by in `total`; 1 without.
        student_entropy: entropy of the student's distribution at temperature 1; 0 unless metrics were asked for.
        teacher_ce: cross-entropy of the teacher against the labels; 0 unless metrics were asked for.
        teacher_entropy: entropy of the teacher's distribution at temperature 1; 0 unless metrics were asked for.
        agreement: share of tokens at which student and teacher have the same top-1 token; 0 unless asked for.
        hidden: [pairs], the distances between hidden states that `add_hidden` has put into `total`; None without.
        hidden_factor: what `balance` multiplied their mean by there.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor
    kd_factor: Tensor
    student_entropy: Tensor
    teacher_ce: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    hidden: Tensor | None = None
    hidden_factor: Tensor | None = None

    def logged(self) -> Tensor:
        """Total, ce, kd and balanced kd, [4]; with hidden states also the balanced mean and each, [5 + pairs]."""
        values = torch.stack([self.total.detach(), self.ce, self.kd, self.kd_factor * self.kd])
        if self.hidden is None or self.hidden_factor is None:
            return values
        return torch.cat([values, (self.hidden_factor * self.hidden.mean())[None], self.hidden])


def distillation_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    num_tokens: int | Tensor,
    targets: Targets | SparseTargets | None = None,
    *,
    scored: Tensor | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_temperature_squared: bool = True,
    teacher_share: float = 1.0,
    label_margin: float = 0.0,
    balance: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    compile: bool = False,
    with_metrics: bool = False,
    vocabulary: Vocabulary | None = None,
) -> Loss:
    """Cross-entropy on the labels and a divergence to the teacher, without ever holding all logits.

    With p = softmax(teacher / T) and q = softmax(student / T), the divergence of a token is D(p, q). Its gradient
    shrinks as 1 / T^2, hence the factor T^2 of Hinton et al. 2015 ("Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531, section 2), on by default. Softmax and sums are in float32 (float64 for float64 models) whatever
    the type of the models.

    Vocabularies may differ by padding at their end: the divergence is then taken over the entries that both have, each
    distribution normalised over those. The cross-entropy is over the student's whole vocabulary, as in fine-tuning.

    With `vocabulary`, each rank of a group has its slice of both heads, and the same hidden states and labels. The loss
    is then that of the whole heads on each rank, with the gradients of this rank's slice and of the hidden states
    through all slices: whatever made these from what all ranks have must not add the ranks' gradients up once more.

    Args:
        hidden: [b, s, d], the student's final hidden states, after the last norm.
        head: the student's output projection, weight [v, d]: an `nn.Linear`, or what `Projection` says beside it.
        labels: [b, s], the token that each position is scored against, or `IGNORE`.
        num_tokens: labelled tokens of the whole optimizer step; every sum is divided by it once.
        targets: the teacher's distributions, of every position or of the labelled ones alone; None leaves the
            divergence out.
        scored: [t] int64, which of the b * s positions have a label; None: looked for, for which a GPU has to wait.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the divergence.
        divergence: D; one of `divergences`, or a function of one's own through `by_autograd`.
        temperature: > 0, softens both distributions of the divergence; never the cross-entropy.
        teacher_temperature: of the teacher's; None: the same. The factor T^2 is of `temperature`, which is the
            student's: it is its gradient that shrinks.
        scale_by_temperature_squared: False leaves out the factor T^2, as TRL and Megatron-LM do.
        teacher_share: below 1, the target is softmax(share * teacher + (1 - share) * student / T), the student detached
            (Shing et al. 2025, "TAID", arXiv:2501.16937, equation 3); raise it to 1 in the course of training.
        label_margin: above 0, the teacher's distribution is mixed with the label: where the teacher would say something
            else, by as little as lets the label win by this much probability; where it is right, the label gains as
            much, up to 1 (Model Optimizer's `MFTLoss`, where it is `threshold`).
        balance: also multiply the divergence by ce / kd, as they are here, without gradient: it then weighs as much as
            the cross-entropy (Model Optimizer's `kd_loss_scale` is `kd_weight`). Costs one more product per model. The
            factor is that of this call, so a step depends on its split into micro-batches. It grows without bound as
            the student reaches the teacher.
        label_smoothing: share of the uniform distribution in the labels of the cross-entropy.
        z_loss: weight of (log sum exp logits)^2, added to the cross-entropy (Chowdhery et al. 2022, "PaLM",
            arXiv:2204.02311, section 5; 1e-4 there).
        chunk_size: labelled tokens whose logits exist at one time; None: `default_chunk_size`.
        compile: fuse the element-wise part with torch.compile; on the CPU that needs a C++ compiler.
        with_metrics: also compute the entropies, `teacher_ce` and `agreement` from the same logits.
        vocabulary: how the ranks of a tensor-parallel group split it; None: as the teacher's head says, or without one
            the student's, in an attribute `vocabulary`; if it has none, the heads are whole.

    Returns:
        A `Loss`. Without any labelled token here all values are 0 and `total` still has a graph.

    Raises:
        ValueError: a setting out of its range, or that these targets cannot serve.
    """
    if vocabulary is None:
        vocabulary = getattr(targets.head if isinstance(targets, Targets) else head, "vocabulary", None)
    if teacher_temperature is None:
        teacher_temperature = temperature
    student = Projection(hidden, head)
    teacher = Projection(targets.hidden, targets.head) if isinstance(targets, Targets) else targets
    vocab_size, teacher_vocab_size = student.vocab_size, None if teacher is None else teacher.vocab_size
    if vocabulary is not None:
        vocab_size = vocabulary.size
        if isinstance(teacher, Projection):
            teacher_vocab_size = vocabulary.teacher_size
    settings = rows.Settings(
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        kd_scale=temperature**2 if scale_by_temperature_squared else 1.0,
        mixes_student=teacher_share != 1,
        label_margin=label_margin,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        student_activation=student.activation,
        teacher_activation=teacher.activation if isinstance(teacher, Projection) else rows.Activation(),
        convention=teacher.convention if isinstance(teacher, SparseTargets) else None,
        vocab_size=vocab_size,
        shared_size=min(vocab_size, teacher_vocab_size or vocab_size),
        vocabulary=vocabulary,
        with_metrics=with_metrics,
    )
    _check(hidden, labels, num_tokens, targets, teacher_share, kd_weight, balance, chunk_size, settings)
    if vocabulary is not None:
        _check_split(vocabulary, student, teacher, divergence)
    if scored is None:
        scored = scored_positions(labels)
    of_teacher = scored  # which of the teacher's positions are scored
    if targets is not None and targets.positions != labels.shape:
        if len(scored) != targets.positions[0]:
            raise ValueError(
                f"the teacher's targets are of {targets.positions[0]} positions, and {len(scored)} have a label: there "
                "has to be one entry for each, in order. Take those of this batch."
            )
        of_teacher = torch.arange(len(scored), device=scored.device)
    positions = scored, of_teacher
    sweep = _Sweep(student, teacher, labels, positions, num_tokens, teacher_share, settings, chunk_size, compile)
    # Not torch.tensor, whose copy from the host waits for the device.
    weights = torch.stack([hidden.new_full((), weight, dtype=sweep.dtype) for weight in (ce_weight, kd_weight)])
    kd_factor = torch.ones_like(weights[1])
    if balance:
        means = sweep(weights)
        kd_factor = torch.where(means["kd"] > 0, means["ce"] / means["kd"], kd_factor)
        weights[1] *= kd_factor
    total, *values = _ChunkedLoss.apply(sweep, weights, torch.is_grad_enabled(), *student.tensors)
    return Loss(total=total, kd_factor=kd_factor, **dict(zip(rows.SUMS[1:], values, strict=True)))


def default_chunk_size(vocab_size: int, teacher_vocab_size: int, device: torch.device) -> int:
    """Labelled tokens of which the logits of both models fit into 256 MiB, on a GPU into 1 GiB; at least 64.

    Products of so many rows run at full speed; more rows would only take memory.
    """
    budget = 2**30 if device.type in ("cuda", "meta") else 2**28  # a plan on meta is one of a GPU
    return max(64, budget // (4 * (vocab_size + teacher_vocab_size)) // 64 * 64)


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of a chunk that are scored at a time: so few that each pass finds in the cache what the last one wrote."""
    return max(1, (2**19 if device.type == "cpu" else 2**23) // vocab_size)


def _check(
    hidden: Tensor,
    labels: Tensor,
    num_tokens: int | Tensor,
    targets: Targets | SparseTargets | None,
    teacher_share: float,
    kd_weight: float,
    balance: bool,
    chunk_size: int | None,
    settings: rows.Settings,
) -> None:
    if isinstance(num_tokens, int) and num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: a step without a labelled token teaches nothing.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: at least one token has to be looked at.")
    if not 0 < teacher_share <= 1:
        raise ValueError(f"teacher_share={teacher_share}: the target needs some of the teacher, above 0 and up to 1.")
    of_teacher = None if targets is None else targets.positions
    if hidden.shape[:-1] != labels.shape or (of_teacher not in (None, labels.shape) and len(of_teacher) != 1):
        raise ValueError(
            f"positions do not match: labels {list(labels.shape)}, hidden states {list(hidden.shape[:-1])}, teacher "
            f"{None if of_teacher is None else list(of_teacher)}. Each position needs one of each, or the teacher has "
            "those with a label alone, [t]."
        )
    if targets is None:
        for name, value, default in (
            ("kd_weight", kd_weight, 0),
            ("balance", balance, False),
            ("temperature", settings.temperature, 1),
            ("teacher_temperature", settings.teacher_temperature, 1),
            ("teacher_share", teacher_share, 1),
            ("label_margin", settings.label_margin, 0),
        ):
            if value != default:
                raise ValueError(f"{name}={value} is about a teacher, and there is none.")
        if settings.with_metrics:
            raise ValueError("Metrics compare with a teacher, and there is none.")
    check_convention(
        settings.convention,
        settings.divergence,
        temperature=settings.temperature,
        teacher_temperature=settings.teacher_temperature,
        teacher_share=teacher_share,
        label_margin=settings.label_margin,
    )


def _check_split(
    vocabulary: Vocabulary, student: Projection, teacher: Projection | SparseTargets | None, divergence: Divergence
) -> None:
    heads = [("student", student, vocabulary.size)]
    if isinstance(teacher, Projection):
        heads.append(("teacher", teacher, vocabulary.teacher_size))
        x = student.inputs[0]
        if not is_sum_over_entries(divergence, x.dtype if x.dtype == torch.float64 else torch.float32, x.device):
            name = getattr(getattr(divergence, "func", divergence), "__name__", "this divergence")
            raise ValueError(
                f"{name} is not a sum over the entries of the vocabulary, and ranks that split it can only add up what "
                "each computes of its own. Take another divergence (adaptive_kl sorts whole rows; for one of your own, "
                "write 1 - sum f as sum (p - f)), or do not split the vocabulary."
            )
    for name, head, size in heads:
        held = vocabulary.held(size)
        if head.vocab_size != held.stop - held.start:
            raise ValueError(
                f"the {name}'s head has {head.vocab_size} entries on rank {vocabulary.rank} of {vocabulary.ranks}, and "
                f"should have {held.start} to {held.stop} of {size}: p and q of an entry have to meet on one rank. Cut "
                "both heads as Vocabulary.held says."
            )


class _Sweep:
    """One pass over the labelled positions of a call."""

    def __init__(
        self,
        student: Projection,
        teacher: Projection | SparseTargets | None,
        labels: Tensor,
        positions: tuple[Tensor, Tensor],
        num_tokens: int | Tensor,
        teacher_share: float,
        settings: rows.Settings,
        chunk_size: int | None,
        compile: bool,
    ):
        self.student = student
        self.labels = labels.flatten()[:, None]  # [b * s, 1]
        self.scored, self.of_teacher = positions  # [t] both
        self.num_tokens = num_tokens
        self.settings = settings
        self.dtype = torch.float64 if student.inputs[0].dtype == torch.float64 else torch.float32
        self.teacher_share = torch.full((), teacher_share, dtype=self.dtype, device=labels.device)
        self.teacher = teacher if isinstance(teacher, Projection) else None
        self.sparse = teacher.flat(self.dtype, settings.with_metrics) if isinstance(teacher, SparseTargets) else ()
        self.teacher_vocab_size = 0 if self.teacher is None else self.teacher.vocab_size
        self.vocabulary = settings.vocabulary
        sizes = student.vocab_size, self.teacher_vocab_size
        if self.vocabulary is not None:  # chunks have to be the same on each rank, whatever it holds
            block = self.vocabulary.block
            sizes = min(block, self.vocabulary.size), 0 if self.teacher is None else block
        self.chunk_size = chunk_size or default_chunk_size(*sizes, labels.device)
        self.compile = compile
        self.block_rows = block_rows(sizes[0], labels.device)
        if compile:  # for one shape only, so it should be one that even a short chunk has
            self.block_rows = min(self.block_rows, 64)

    @torch.no_grad()
    def __call__(self, weights: Tensor, gradients: Gradients | None = None) -> dict[str, Tensor]:
        """Means by their names in `rows.SUMS`, and, if asked, the gradients of their sum under `weights`, [2]."""
        with torch.autocast("cpu" if weights.is_meta else weights.device.type, enabled=False):
            sums = self._sum(weights / self.num_tokens, gradients)
        return dict(zip(rows.SUMS, (sums / self.num_tokens).unbind(), strict=True))

    def _sum(self, weights: Tensor, gradients: Gradients | None) -> Tensor:
        settings = dataclasses.replace(self.settings, with_grad=gradients is not None)
        sums = weights.new_zeros(len(rows.SUMS))
        size = min(self.chunk_size, len(self.scored))
        student_buffer = weights.new_empty(size, self.student.vocab_size)
        teacher_buffer = weights.new_empty(size, self.teacher_vocab_size)  # free again once a chunk is scored
        sparse = rows.outcomes(self.sparse, settings) if self.sparse else ()
        parts = self.of_teacher.split(self.chunk_size)
        for positions, of_teacher in zip(chunks(self.scored, self.chunk_size), parts, strict=False):
            logits = self.student.logits(positions, student_buffer)  # [n, v]
            teacher_chunk = tuple(x[of_teacher] for x in sparse)
            if self.teacher is not None:
                teacher_chunk = (self.teacher.logits(of_teacher, teacher_buffer),)  # [n, v_t]
            chunk = (logits, self.labels[positions], *teacher_chunk)
            blocks = list(zip(*(x.split(self.block_rows) for x in chunk), strict=True))
            pulls = []
            for (block, labels, *teacher), found in zip(blocks, self._exchange(blocks, settings), strict=True):
                score = self._fused(rows.score, block)
                share, pull = score(block, tuple(teacher), labels, weights, self.teacher_share, settings, found)
                sums += share
                if pull is not None:
                    pulls.append(pull)
            if pulls:
                self._settle(logits, teacher_chunk[0], torch.cat(pulls))
            if gradients is not None:
                gradients.add(positions, logits, buffer=teacher_buffer)
        return sums if self.vocabulary is None else self.vocabulary.sum(sums)

    def _exchange(self, blocks: list[tuple[Tensor, ...]], settings: rows.Settings) -> list[dict[str, Tensor]]:
        """What ranks have to know of each other's entries, for each block; at once for all of a chunk."""
        if self.vocabulary is None:
            return [{}] * len(blocks)
        measured = []
        for block, labels, *teacher in blocks:
            measure = self._fused(rows.measure, block)
            measured.append(measure(block, tuple(teacher), labels, self.teacher_share, settings))
        found = self.vocabulary.gather({name: torch.cat([x[name] for x in measured]) for name in measured[0]})
        parts = zip(*(x.split(self.block_rows, dim=1) for x in found.values()), strict=True)  # [ranks, r, w] each
        return [dict(zip(found, (x.contiguous() for x in part), strict=True)) for part in parts]

    def _settle(self, logits: Tensor, teacher_logits: Tensor, pull: Tensor) -> None:
        """Complete the gradient in `logits` by the pull of all ranks; see `rows.score`."""
        assert self.vocabulary is not None
        shared = min(logits.shape[-1], teacher_logits.shape[-1])
        logits[:, :shared].addcmul_(teacher_logits[:, :shared], self.vocabulary.sum(pull), value=-1)

    def _fused(self, function: Callable[..., Any], block: Tensor) -> Callable[..., Any]:
        # The few rows that are left over cost little as they are.
        return _compiled(function) if self.compile and len(block) == self.block_rows else function


def scored_positions(labels: Tensor) -> Tensor:
    """Which of [...] labels there are, [t] int64, counted through all of them. A GPU has to wait for it."""
    return (labels.flatten() != IGNORE).nonzero()[:, 0]


def chunks(scored: Tensor, size: int) -> Sequence[Tensor]:
    """`size` positions at a time. A plan takes the first two, which take what the others take."""
    return scored.split(size) if len(scored) else ()


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients in the forward, where the logits are at hand; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, sweep: _Sweep, weights: Tensor, with_grad: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        # Whether gradients are enabled cannot be seen from in here.
        needed = [with_grad and needed for needed in ctx.needs_input_grad[3:]]
        gradients = Gradients(sweep.student, needed, sweep.dtype, sweep.vocabulary) if any(needed) else None
        ce_objective, *values = sweep(weights, gradients).values()
        ctx.save_for_backward(*(gradients.finish() if gradients else [None] * len(tensors)))
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return _weighted(weights[0], ce_objective) + _weighted(weights[1], values[1]), *values

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("The objective has no second derivative: its gradient is a constant by now.")
        grads = [None if grad is None or grad_total is None else grad * grad_total for grad in ctx.saved_tensors]
        return None, None, None, *grads


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0, weight * value)  # also of an infinite value, which is not asked for then


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
