"""Divergences D of a student's next-token distribution q from a teacher's p.

Each is a function of log p and log q, [n, v] both, every row normalised, and returns

    values  [n]     D of each row, in nats
    slopes  [n, v]  q dD/dq = dD / d log q, up to a multiple of q

from which the engine makes the gradient of the logits z of q: since d log q_i / d z_j = [i = j] - q_j, it is
slopes - q * sum(slopes), in which a multiple of q cancels. Where p = q, slopes are 0 to the last bit: an optimizer that
divides by the size of the gradient would make a step of its rounding. For the same reason values of KL divergences have
sum (q - p), which is 0, in their terms: an error of the normalisation then counts only squared, and no term is below 0.

No term looks at another entry of its row (but for the weights of `adaptive_kl`): where rows are split over devices,
sums are added up, no more. Logarithms of 0 arrive as a huge negative number, so that 0 * log 0 is 0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q), at least 0, unbounded: the student has to cover all that the teacher may say.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    p, q = log_p.exp(), log_q.exp()
    slopes = q.sub_(p)
    return (log_p - log_q).mul_(p).add_(slopes).sum(-1), slopes


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p), at least 0, unbounded: the student has to avoid what the teacher rules out.

    Gu et al. 2023, "MiniLLM", arXiv:2306.08543, equation 1.
    """
    p, q = log_p.exp(), log_q.exp()
    slopes = (log_q - log_p).mul_(q)
    return p.sub_(q).add_(slopes).sum(-1), slopes


def symmetric_kl(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """beta KL(p || q) + (1 - beta) KL(q || p), at least 0, unbounded.

    Twice the value at beta 0.5 is Jeffreys' divergence. `beta` is the weight of the forward KL.
    """
    return _mixed_kl(log_p, log_q, beta)


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, from 0 to H(beta).

    The generalised Jensen-Shannon divergence of Agarwal et al. 2023, "On-Policy Distillation of Language Models",
    arXiv:2306.13649, equation 1. H is the entropy of a coin of that bias, log 2 at 0.5. `beta` is the teacher's weight
    in the mixture. The value is about beta KL(p || q) as beta tends to 0 and (1 - beta) KL(q || p) as it tends to 1: at
    both ends it vanishes, and its gradient with it.
    """
    log_ratio, log_m_over_q = _log_ratios(log_p, log_q, beta)
    slopes = log_q.exp().mul_(log_m_over_q).mul_(beta - 1)
    return log_ratio.sub_(log_m_over_q).mul_(log_p.exp()).mul_(beta).add_(slopes).sum(-1), slopes


def skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(p || alpha p + (1 - alpha) q), from 0 to -log(alpha): a forward KL that forgives what q leaves out.

    Ko et al. 2024, "DistiLLM", arXiv:2402.03898, equation 4.
    """
    p, q = log_p.exp(), log_q.exp()
    log_ratio, log_m_over_q = _log_ratios(log_p, log_q, alpha)
    values = log_ratio.sub_(log_m_over_q).mul_(p).add_(q - p, alpha=1 - alpha).sum(-1)
    return values, q.sub_(p.mul_(log_m_over_q.neg_().exp_())).mul_(1 - alpha)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(q || alpha q + (1 - alpha) p), from 0 to -log(alpha): a reverse KL that forgives what p leaves out.

    Ko et al. 2024, "DistiLLM", arXiv:2402.03898, equation 5.
    """
    q = log_q.exp()
    _, log_m_over_q = _log_ratios(log_p, log_q, 1 - alpha)
    values = log_p.exp().sub_(q).mul_(1 - alpha).sub_(q * log_m_over_q).sum(-1)
    return values, q.neg_().mul_(torch.expm1(-log_m_over_q).mul_(alpha).add_(log_m_over_q))


def total_variation(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 sum |p - q|, from 0 to 1.

    Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", arXiv:2307.15190.
    """
    q = log_q.exp()
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(-1), difference.sign_().mul_(q).mul_(0.5)


def adaptive_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """w KL(p || q) + (1 - w) KL(q || p), at least 0, unbounded, w the head's share of sum |p - q|.

    The head of a row is its most likely tokens by the teacher, as many as have at most half of the probability together
    (at least one). The forward KL learns the head first, the reverse KL the tail: each weighs as much as there is left
    to learn on its side. The weight has no gradient.
    Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    arXiv:2404.02657, section 4.
    """
    p = log_p.exp()
    gap = log_q.exp().sub_(p).abs_()
    weight = torch.ops.kdtune.of_head(p, gap) / gap.sum(-1, keepdim=True).clamp_(
        min=torch.finfo(gap.dtype).tiny
    )  # [n, 1]
    return _mixed_kl(log_p, log_q, weight)


# An operator, so that torch.compile does not look into what depends on the values.
_library = torch.library.Library("kdtune", "FRAGMENT")
_library.define("of_head(Tensor p, Tensor gap) -> Tensor")


@torch.library.impl("kdtune::of_head", "default")
def _of_head(p: Tensor, gap: Tensor) -> Tensor:
    """The sums of `gap` over the heads of `p`, [n, 1]. On a GPU it waits for the device."""
    size = p.shape[-1]
    num_candidates = min(64, size)
    top, ids = p.topk(num_candidates)  # [n, 64], descending
    while num_candidates < size and (top.sum(-1) <= 0.5).any():
        num_candidates = min(16 * num_candidates, size)
        top, ids = p.topk(num_candidates)
    in_head = top.cumsum(-1) <= 0.5
    in_head[:, 0] = True
    return (gap.gather(-1, ids) * in_head).sum(-1, keepdim=True)


@torch.library.register_fake("kdtune::of_head")
def _(p: Tensor, gap: Tensor) -> Tensor:
    return gap.new_empty(len(gap), 1)


def by_autograd(function: Callable[[Tensor, Tensor], Tensor]) -> Divergence:
    """Make a divergence of a plain, differentiable function of log p and log q, [n, v] both, that returns D, [n].

    Its slopes come from autograd, one block of rows at a time.
    """

    @functools.wraps(function)
    def values_and_slopes(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        values, pull, *_ = torch.func.vjp(lambda log_q: function(log_p, log_q), log_q)
        (slopes,) = pull(torch.ones_like(values))
        return values, slopes

    return values_and_slopes


@functools.cache  # compiled code is made anew for each function that it meets
def divergence(name: DivergenceName, *, beta: float | None = None, alpha: float | None = None) -> Divergence:
    """The divergence of that name.

    Args:
        name: of a function of this module.
        beta: of `jsd` and `symmetric_kl`, between 0 and 1; None: 0.5.
        alpha: of `skew_forward_kl` and `skew_reverse_kl`, between 0 and 1; None: 0.1.

    Raises:
        ValueError: no such divergence, a parameter that it does not have, or one that is out of its range.
    """
    if name not in _BY_NAME:
        raise ValueError(f"there is no divergence {name!r}; known are {', '.join(_BY_NAME)}.")
    function = _BY_NAME[name]
    given = {key: value for key, value in (("beta", beta), ("alpha", alpha)) if value is not None}
    for key, value in given.items():
        if key not in _parameters(name):
            owners = " and ".join(other for other in _BY_NAME if key in _parameters(other))
            raise ValueError(f"{key}={value} does not apply to {name}; it belongs to {owners}.")
        if not 0 < value < 1:
            raise ValueError(f"{key}={value}: {name} needs one between 0 and 1; at the ends it is another divergence.")
    return functools.partial(function, **given) if given else function


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(_BY_NAME[name]).parameters)[2:]


def _mixed_kl(log_p: Tensor, log_q: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """weight KL(p || q) + (1 - weight) KL(q || p)."""
    p, q = log_p.exp(), log_q.exp()
    log_ratio = log_p - log_q
    forward, reverse = q - p, q.mul_(log_ratio).neg_()  # slopes of each
    values = log_ratio.mul_(p).add_(forward).mul_(weight).add_((reverse - forward).mul_(1 - weight)).sum(-1)
    return values, forward.mul_(weight).add_(reverse.mul_(1 - weight))


def _log_ratios(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log p/q and log m/q of m = share * p + (1 - share) * q, both 0 where p = q."""
    log_ratio = (log_p - log_q).clamp_(max=80)  # beyond it q does not count any more, and exp would be infinite
    return log_ratio, torch.expm1(log_ratio).mul_(share).log1p_()


_BY_NAME: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        symmetric_kl,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        total_variation,
        adaptive_kl,
    )
}
