"""The chunked objective.

Logits are the largest tensors of a distillation step: `[tokens, vocabulary]` in float32 for student and teacher,
several times over once autograd keeps what it needs. Here they exist for one chunk of labelled tokens at a time. Each
chunk is projected once per model, its loss and its gradient are computed together, and only the gradients of the hidden
states and of the head stay. Memory does not grow with the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100  # label of a position that is not scored: prompt, padding, the end of a document


@dataclass(frozen=True)
class Loss:
    """The objective of one micro-batch; every value is a sum over its labelled tokens divided by `num_tokens`.

    Attributes:
        total: `ce_weight * ce + kd_weight * kd`, the only value that carries a graph.
        ce: cross-entropy of the student against the labels, in nats, at temperature 1.
        kd: divergence to the teacher in nats, times temperature squared if asked; 0 without a teacher.
        teacher_ce: cross-entropy of the teacher against the labels; 0 unless metrics were asked for.
        teacher_entropy: entropy of the teacher's distribution at temperature 1; 0 unless metrics were asked for.
        agreement: share of tokens at which student and teacher have the same top-1 token; 0 unless asked for.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor
    teacher_ce: Tensor
    teacher_entropy: Tensor
    agreement: Tensor


def distillation_loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    num_tokens: int | Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Linear | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    chunk_size: int = 512,
    with_metrics: bool = False,
) -> Loss:
    """Cross-entropy on the labels and forward KL to the teacher, without ever holding all logits.

    With p = softmax(teacher / T) and q = softmax(student / T), the divergence of a token is KL(p || q) =
    sum p (log p - log q) (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). Its gradient shrinks as
    1 / T^2, hence the factor T^2 of section 2 of that paper, on by default. Softmax and sums are in float32 (float64
    for float64 models) whatever the type of the models.

    Vocabularies may differ by padding at their end: the divergence is then taken over the entries that both have, each
    distribution normalised over those. The cross-entropy is over the student's whole vocabulary, as in fine-tuning.

    Args:
        hidden: [b, s, d], the student's final hidden states, after the last norm.
        head: the student's output projection, weight [v, d].
        labels: [b, s], the token that each position is scored against, or `IGNORE`.
        num_tokens: labelled tokens of the whole optimizer step; every sum is divided by it once.
        teacher_hidden: [b, s, d_t]; None (with `teacher_head`) leaves the divergence out.
        teacher_head: weight [v_t, d_t]. Nothing of the teacher receives a gradient.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the divergence.
        temperature: > 0, softens both distributions of the divergence; never the cross-entropy.
        scale_by_temperature_squared: False leaves out the factor T^2, as TRL and Megatron-LM do.
        chunk_size: labelled tokens whose logits exist at one time.
        with_metrics: also compute `teacher_ce`, `teacher_entropy` and `agreement` from the same logits.

    Returns:
        A `Loss`. Without any labelled token here all values are 0 and `total` still has a graph.

    Raises:
        ValueError: `kd_weight` without a teacher, a temperature that is not positive, or no labelled token in the whole
            step.
    """
    if teacher_head is None and (kd_weight != 0 or with_metrics):
        raise ValueError(f"kd_weight={kd_weight} and metrics compare with a teacher, and there is none.")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}: both distributions are divided by it.")
    if isinstance(num_tokens, int) and num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: a step without a labelled token teaches nothing.")
    scale = temperature**2 if scale_by_temperature_squared else 1.0
    settings = _Settings(ce_weight, kd_weight, temperature, scale, chunk_size, with_metrics, torch.is_grad_enabled())
    teacher: tuple[Tensor | None, ...] = (None, None, None)
    if teacher_hidden is not None and teacher_head is not None:
        teacher = (teacher_hidden.detach(), teacher_head.weight.detach(), teacher_head.bias)
    total, ce, kd, teacher_ce, entropy, agreement = _ChunkedLoss.apply(
        hidden, head.weight, head.bias, *teacher, labels, num_tokens, settings
    )
    return Loss(total, ce, kd, teacher_ce, entropy, agreement)


@dataclass(frozen=True)
class _Settings:
    ce_weight: float
    kd_weight: float
    temperature: float
    kd_scale: float
    chunk_size: int
    with_metrics: bool
    with_grad: bool  # inside of an autograd.Function neither the grad mode nor needs_input_grad tells


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients in the forward, where the logits are at hand; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor,
        num_tokens: int | Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        sum_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight, needs_bias = (settings.with_grad and needed for needed in ctx.needs_input_grad[:3])
        needs_grad = needs_hidden or needs_weight or needs_bias
        hidden_grad = torch.zeros_like(hidden).flatten(0, 1) if needs_hidden else None  # [b * s, d]
        weight_grad = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None  # [v, d]
        bias_grad = torch.zeros_like(bias, dtype=sum_dtype) if bias is not None and needs_bias else None  # [v]

        labels = labels.flatten()
        scored = (labels != IGNORE).nonzero().squeeze(1)  # [t]
        project = _Projection(weight, bias, sum_dtype)
        teacher_project = None if teacher_weight is None else _Projection(teacher_weight, teacher_bias, sum_dtype)
        sums = torch.zeros(5, dtype=sum_dtype, device=hidden.device)
        for rows in scored.split(settings.chunk_size):
            chunk = hidden.flatten(0, 1)[rows]  # [n, d]
            logits = project(chunk)  # [n, v]
            teacher_logits = None
            if teacher_hidden is not None and teacher_project is not None:
                teacher_logits = teacher_project(teacher_hidden.flatten(0, 1)[rows])  # [n, v_t]
            chunk_sums, logits_grad = _chunk_loss(logits, teacher_logits, labels[rows], settings, needs_grad)
            sums += chunk_sums
            if needs_grad:
                logits_grad /= num_tokens
            if hidden_grad is not None:
                hidden_grad[rows] = (logits_grad @ project.weight).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, chunk.to(sum_dtype))
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0)

        ce, kd, teacher_ce, entropy, agreement = (sums / num_tokens).unbind()
        ctx.save_for_backward(
            None if hidden_grad is None else hidden_grad.view_as(hidden),
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(weight.dtype),
        )
        ctx.mark_non_differentiable(ce, kd, teacher_ce, entropy, agreement)
        ctx.set_materialize_grads(False)
        return settings.ce_weight * ce + settings.kd_weight * kd, ce, kd, teacher_ce, entropy, agreement

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 9
        hidden_grad, weight_grad, bias_grad = (
            None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden_grad, weight_grad, bias_grad, None, None, None, None, None, None


class _Projection:
    """hidden -> logits in `dtype`: rounding logits to bf16 destroys the gradient when student and teacher are close."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype)  # [v, d]; the tensor itself where the type is already right
        self.bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def _chunk_loss(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, settings: _Settings, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sums over the chunk of (ce, kd, teacher_ce, teacher_entropy, agreement), and d total / d logits."""
    labels = labels[:, None]
    kd = teacher_ce = entropy = agreement = logits.new_zeros(())
    kd_grad = None
    if teacher_logits is not None:
        shared = min(logits.shape[-1], teacher_logits.shape[-1])
        student_shared, teacher_shared = logits[:, :shared], teacher_logits[:, :shared]
        if settings.with_metrics:
            agreement = (student_shared.argmax(-1) == teacher_shared.argmax(-1)).sum()
            log_p = teacher_shared.log_softmax(-1)
            teacher_ce = -log_p.gather(-1, labels.clamp(max=shared - 1)).sum()
            entropy = torch.special.entr(log_p.exp()).sum()
        log_p = teacher_shared.div(settings.temperature).log_softmax(-1)  # [n, v]
        log_q = student_shared.div(settings.temperature).log_softmax(-1)  # [n, v]
        p = log_p.exp()
        # An entry that the teacher rules out (logit -inf) adds 0, the limit of p log p.
        kd = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum() * settings.kd_scale
        if needs_grad:
            # d KL / d logits = (q - p) / T
            kd_grad = log_q.exp_().sub_(p).mul_(settings.kd_weight * settings.kd_scale / settings.temperature)

    log_q = logits.log_softmax(-1)  # [n, v]
    ce = -log_q.gather(-1, labels).sum()
    grad = log_q
    if needs_grad:
        # d CE / d logits = q - onehot(label)
        grad = log_q.exp_().scatter_add_(-1, labels, log_q.new_full(labels.shape, -1.0)).mul_(settings.ce_weight)
        if kd_grad is not None:
            grad[:, : kd_grad.shape[-1]] += kd_grad
    return torch.stack([ce, kd, teacher_ce, entropy, agreement.to(ce.dtype)]), grad
