"""Small problems for the objective, and what it computes written with all logits at once."""

import torch
from torch import nn

from kdtune.losses import IGNORE, Loss, SparseTargets, Targets, distillation_loss


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


def make_logits(n=29, v=37, size=2.0, seed=0, dtype=torch.float64):
    """[n, v], of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(n, v, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def loss_of_logits(student, teacher, labels=None, num_tokens=1, **settings) -> Loss:
    """The objective of logits, [..., v], as hidden states of a head that passes them on. The teacher's, or targets."""
    labels = torch.zeros(student.shape[:-1], dtype=torch.long) if labels is None else labels
    targets = teacher if isinstance(teacher, Targets | SparseTargets) else Targets(teacher, identity(teacher))
    settings = {"ce_weight": 0.0, "kd_weight": 1.0} | settings
    return distillation_loss(student, identity(student), labels, num_tokens, targets, **settings)


def values_of(loss: Loss) -> dict[str, torch.Tensor]:
    """All values by name, of a loss without hidden states."""
    return {name: value for name, value in vars(loss).items() if value is not None}


def kd_and_grad(student, teacher, **settings):
    """The divergence, summed over all positions, and its gradient to the student's logits."""
    student = student.detach().requires_grad_()
    loss = loss_of_logits(student, teacher, **settings)
    return loss.kd, torch.autograd.grad(loss.total, student)[0]


def assert_padding_gets_nothing(found, expected):
    """Of float32: loss and gradient are those of the vocabulary alone, and the entries behind it have no gradient."""
    (kd, grad), (expected_kd, expected_grad) = found, expected
    size = expected_grad.shape[-1]
    torch.testing.assert_close(kd.double(), expected_kd, rtol=1e-5, atol=0)
    assert (grad[:, :size] - expected_grad).norm() < 1e-5 * expected_grad.norm()
    assert grad.shape[-1] > size
    assert grad[:, size:].abs().max() == 0


def identity(logits):
    """A head that passes logits on."""
    head = nn.Linear(logits.shape[-1], logits.shape[-1], bias=False, dtype=logits.dtype)
    nn.init.eye_(head.weight)
    return head


# Every divergence as a function of probabilities p and q, [n, v], by its definition.


def _log(x):
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()


def kl(p, q):
    impossible = ((p > 0) & (q == 0)).any(-1)
    return (p * (_log(p) - _log(q))).sum(-1).masked_fill(impossible, torch.inf)


def jsd(p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive_kl(p, q):
    """With the head by a full sort."""
    sorted_p, ids = p.sort(-1, descending=True)
    in_head = sorted_p.cumsum(-1) <= 0.5
    in_head[:, 0] = True
    gap = (p - q).abs().gather(-1, ids).detach()
    weight = (gap * in_head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
    return weight * kl(p, q) + (1 - weight) * kl(q, p)


DEFINITIONS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "symmetric_kl": lambda p, q, beta=0.5: beta * kl(p, q) + (1 - beta) * kl(q, p),
    "jsd": jsd,
    "skew_forward_kl": lambda p, q, alpha=0.1: kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda p, q, alpha=0.1: kl(q, alpha * q + (1 - alpha) * p),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "adaptive_kl": adaptive_kl,
}
