"""Small problems for the objective, and what it computes written with all logits at once."""

import torch
from torch import nn

from kdtune.losses import IGNORE, Targets, distillation_loss


def make_problem(dtype=torch.float64, v=123, v_t=None, d=31, d_t=17, b=3, s=47, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = nn.Linear(d, v, bias=bias, dtype=dtype)
    teacher_head = nn.Linear(d_t, v_t or v, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in (*head.parameters(), *teacher_head.parameters()):
            p.copy_(rand(*p.shape) * 0.5)
    hidden = rand(b, s, d).requires_grad_()
    teacher_hidden = rand(b, s, d_t)
    labels = torch.randint(0, min(v, v_t or v), (b, s), generator=generator)
    labels[torch.rand(b, s, generator=generator) < 0.4] = IGNORE
    return hidden, head, teacher_hidden, teacher_head, labels


def dense_loss(hidden, head, teacher_hidden, teacher_head, labels, num_tokens, kd_ratio, temperature):
    """The definition, written with all logits at once."""
    mask = labels != IGNORE
    z_s, z_t = head(hidden)[mask].double(), teacher_head(teacher_hidden)[mask].double().detach()
    ce = nn.functional.cross_entropy(z_s, labels[mask], reduction="sum") / num_tokens
    v = min(z_s.shape[-1], z_t.shape[-1])
    log_q = (z_s[:, :v] / temperature).log_softmax(-1)
    log_p = (z_t[:, :v] / temperature).log_softmax(-1)
    kd = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2 / num_tokens
    return (1 - kd_ratio) * ce + kd_ratio * kd, ce, kd


def chunked(problem, num_tokens=None, kd_ratio=0.5, **kwargs):
    hidden, head, teacher_hidden, teacher_head, labels = problem
    return distillation_loss(
        hidden,
        head,
        labels,
        num_tokens or int((labels != IGNORE).sum()),
        Targets(teacher_hidden, teacher_head),
        ce_weight=1 - kd_ratio,
        kd_weight=kd_ratio,
        **kwargs,
    )
