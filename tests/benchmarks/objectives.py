"""Cross-entropy and forward KL between two heads, as kdtune, its peers and plain PyTorch compute them.

Each takes a `Problem` and returns `ce_weight * ce + kd_weight * kd` with its graph, over the mean of the labelled
tokens, or the nearest that a peer has: `OBJECTIVES` says what. Peers are called as their own trainers call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdtune import losses


@dataclass(eq=False)
class Problem:
    """What a loss is computed from.

    Attributes:
        hidden: [1, t, d], requires grad.
        head: weight [v, d], requires grad.
        teacher_hidden: [1, t, d_t].
        teacher_head: weight [v, d_t].
        labels: [1, t], aligned with the hidden states.
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the divergence.
    """

    hidden: Tensor
    head: nn.Linear
    teacher_hidden: Tensor
    teacher_head: nn.Linear
    labels: Tensor
    ce_weight: float = 0.5
    kd_weight: float = 0.5

    @functools.cached_property
    def num_labelled(self) -> int:
        return int((self.labels != losses.IGNORE).sum())

    def teacher_logits(self) -> Tensor:
        """[1, t, v]"""
        with torch.no_grad():
            return self.teacher_head(self.teacher_hidden)

    def log_p(self) -> Iterator[Tensor]:
        """The teacher's distributions of the labelled positions, [n, v] at a time."""
        scored = self.labels.flatten() != losses.IGNORE
        for hidden in self.teacher_hidden.flatten(0, 1)[scored].split(256):
            yield F.linear(hidden.float(), self.teacher_head.weight.float()).log_softmax(-1)

    @property
    def targets(self) -> losses.Targets:
        """All of them, as a live teacher gives them."""
        return losses.Targets(self.teacher_hidden, self.teacher_head)

    @functools.cached_property
    def top_k(self) -> losses.TopKTargets:
        """What a cache has of them: the 64 likeliest tokens."""
        log_probs, ids = (
            torch.cat(parts) for parts in zip(*(x.topk(min(64, x.shape[-1])) for x in self.log_p()), strict=True)
        )
        return losses.TopKTargets(ids, log_probs)

    @functools.cached_property
    def samples(self) -> losses.SampledTargets:
        """The same: 12 draws."""
        draws = ((x.exp().multinomial(12, replacement=True), torch.special.entr(x.exp()).sum(-1)) for x in self.log_p())
        ids, entropy = (torch.cat(parts) for parts in zip(*draws, strict=True))
        return losses.SampledTargets(ids, torch.full(ids.shape, 1 / 12, device=ids.device), entropy)


def random_problem(
    tokens: int,
    vocabulary: int,
    width: int,
    teacher_width: int,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """The same problem in every process; nothing larger than its tensors is allocated on the way."""
    torch.manual_seed(0)
    head, teacher_head = (
        nn.Linear(d, vocabulary, bias=False, dtype=dtype, device=device) for d in (width, teacher_width)
    )
    labels = torch.randint(vocabulary, (1, tokens), device=device)
    labels[0, torch.randperm(tokens)[: round(tokens * ignored)]] = losses.IGNORE
    return Problem(
        torch.randn(1, tokens, width, dtype=dtype, device=device).requires_grad_(),
        head,
        torch.randn(1, tokens, teacher_width, dtype=dtype, device=device),
        teacher_head.requires_grad_(False),
        labels,
    )


def kdtune(problem: Problem, known: str | None = "targets", compile: bool = False) -> Tensor:
    """`known`: the attribute of the problem that says what is known of the teacher; None: there is none."""
    targets = None if known is None else getattr(problem, known)
    return losses.distillation_loss(
        problem.hidden,
        problem.head,
        problem.labels,
        problem.num_labelled,
        targets,
        ce_weight=problem.ce_weight,
        kd_weight=0.0 if targets is None else problem.kd_weight,
        compile=compile,
    ).total


def dense(problem: Problem) -> Tensor:
    """Plain PyTorch and autograd, as a training script has it."""
    logits, teacher_logits = problem.head(problem.hidden), problem.teacher_logits()  # [1, t, v]
    kd = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="none")
    scored = problem.labels != losses.IGNORE
    loss = problem.kd_weight * kd.sum(-1)[scored].sum() / problem.num_labelled
    if problem.ce_weight:
        loss = loss + problem.ce_weight * F.cross_entropy(logits.flatten(0, 1), problem.labels.flatten())
    return loss


def torchtune(problem: Problem) -> Tensor:
    """As `knowledge_distillation_single_device` of torchtune 0.6.1 has it, its gradient's faulty scale left out."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    kd_loss, ce_loss = ForwardKLWithChunkedOutputLoss(), CEWithChunkedOutputLoss()
    logits = [problem.head(chunk) for chunk in problem.hidden.chunk(kd_loss.num_output_chunks, dim=1)]
    with torch.no_grad():
        teacher_chunks = problem.teacher_hidden.chunk(kd_loss.num_output_chunks, dim=1)
        teacher_logits = [problem.teacher_head(chunk) for chunk in teacher_chunks]
    loss = problem.kd_weight * kd_loss(logits, teacher_logits, problem.labels)
    return loss + problem.ce_weight * ce_loss(logits, problem.labels) if problem.ce_weight else loss


def trl_gkd(problem: Problem) -> Tensor:
    """TRL's `GKDTrainer` with beta = 0."""
    from trl.experimental.gkd import GKDTrainer

    logits, teacher_logits = problem.head(problem.hidden), problem.teacher_logits()  # [1, t, v]
    count = problem.num_labelled
    kd = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, problem.labels, beta=0.0, num_items_in_batch=count)
    return problem.kd_weight * kd


def trl_distillation(problem: Problem) -> Tensor:
    """TRL's `DistillationTrainer` with beta = 0."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    kd, *_ = _chunked_divergence_loss(
        problem.hidden,
        problem.teacher_hidden,
        problem.head.weight,
        problem.teacher_head.weight,
        problem.labels != losses.IGNORE,
        beta=0.0,
    )
    return problem.kd_weight * kd


def liger(problem: Problem, chunk_size: int) -> Tensor:
    """Compiled on GPUs alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    objective = LigerFusedLinearJSDLoss(
        weight_hard_loss=problem.ce_weight,
        weight_soft_loss=problem.kd_weight,
        beta=0.0,
        compiled=problem.hidden.is_cuda,
        chunk_size=chunk_size,
    )
    hidden, teacher_hidden = problem.hidden.flatten(0, 1), problem.teacher_hidden.flatten(0, 1)
    return objective(hidden, problem.head.weight, teacher_hidden, problem.teacher_head.weight, problem.labels.flatten())


def model_optimizer(problem: Problem) -> Tensor:
    """As Model Optimizer's `KDTrainer` computes kd; the cross-entropy is added from the same float32 logits."""
    from modelopt.torch.distill import LogitsDistillationLoss

    logits, teacher_logits = problem.head(problem.hidden).float(), problem.teacher_logits().float()  # [1, t, v]
    kd = LogitsDistillationLoss(reduction="none")(logits, teacher_logits)  # [1, t]
    loss = problem.kd_weight * (kd * (problem.labels != losses.IGNORE)).sum() / problem.num_labelled
    if problem.ce_weight:
        loss = loss + problem.ce_weight * F.cross_entropy(logits.flatten(0, 1), problem.labels.flatten())
    return loss


@dataclass(frozen=True)
class Objective:
    """A row of the tables.

    Attributes:
        title: its name there.
        compute: the loss and its graph.
        value: what the loss is, as a key of `reference`.
        compiles: with torch.compile, also on the CPU.
        known: what there is before it computes, an attribute of the problem.
    """

    title: str
    compute: Callable[[Problem], Tensor]
    value: str = "ce + kd"
    compiles: bool = False
    known: str | None = None


OBJECTIVES = {
    "kdtune": Objective("kdtune", kdtune),
    "kdtune-compiled": Objective("kdtune, compile=True", functools.partial(kdtune, compile=True), compiles=True),
    "dense": Objective("PyTorch, all logits", dense),
    "torchtune": Objective("torchtune", torchtune, "ce + kd + H(teacher)"),
    "trl-gkd": Objective("TRL GKDTrainer", trl_gkd, "kd"),
    "trl-distillation": Objective("TRL DistillationTrainer", trl_distillation, "kd"),
    "liger": Objective("Liger, chunks of 1,024", functools.partial(liger, chunk_size=1024)),  # its default
    "liger-256": Objective("Liger, chunks of 256", functools.partial(liger, chunk_size=256)),
    "modelopt": Objective("Model Optimizer", model_optimizer),
}

# With a teacher out of a cache, and with none.
CACHED = {
    "top-k": Objective(
        "kdtune, top 64 known", functools.partial(kdtune, known="top_k"), "ce + top-k kd", known="top_k"
    ),
    "samples": Objective(
        "kdtune, 12 draws known", functools.partial(kdtune, known="samples"), "ce + drawn kd", known="samples"
    ),
    "labels": Objective("kdtune, labels alone", functools.partial(kdtune, known=None), "ce"),
}


@torch.no_grad()
def reference(problem: Problem) -> dict[str, float]:
    """What each kind of value is for the problem, from float32 logits, whatever its type."""
    scored = problem.labels.flatten() != losses.IGNORE
    columns = (problem.hidden.flatten(0, 1), problem.teacher_hidden.flatten(0, 1), problem.labels.flatten())
    ce = kd = entropy = top_kd = sampled_kd = 0.0
    cached = (problem.top_k.ids, problem.samples.ids)
    chunks = (*(column[scored].split(256) for column in columns), *(ids.split(256) for ids in cached))
    for hidden, teacher_hidden, labels, top, drawn in zip(*chunks, strict=True):
        log_q = F.linear(hidden.float(), problem.head.weight.float()).log_softmax(-1)  # [n, v]
        log_p = F.linear(teacher_hidden.float(), problem.teacher_head.weight.float()).log_softmax(-1)  # [n, v]
        p = log_p.exp()
        ce -= log_q.gather(-1, labels[:, None]).double().sum().item()
        kd += (p * (log_p - log_q)).sum(-1).double().sum().item()
        entropy -= (p * log_p).sum(-1).double().sum().item()
        top_p, top_q = (x.exp().gather(-1, top).double() for x in (log_p, log_q))
        top_p, top_q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (top_p, top_q))
        top_kd += (top_p * (top_p / top_q).log()).sum().item()
        sampled_kd += (p * log_p).sum().item() - log_q.gather(-1, drawn).mean(-1).double().sum().item()
    sums = (ce, kd, entropy, top_kd, sampled_kd)
    ce, kd, entropy, top_kd, sampled_kd = (value / problem.num_labelled for value in sums)
    blend = problem.ce_weight * ce + problem.kd_weight * kd
    return {
        "ce + kd": blend,
        "kd": problem.kd_weight * kd,
        "ce": problem.ce_weight * ce,
        "ce + top-k kd": problem.ce_weight * ce + problem.kd_weight * top_kd,
        "ce + drawn kd": problem.ce_weight * ce + problem.kd_weight * sampled_kd,
        "ce + kd + H(teacher)": blend + problem.kd_weight * entropy,
    }


class BareProducts:
    """The products that no loss can avoid, into buffers that are there: teacher, student, both gradients.

    Only labelled tokens are projected, in chunks. What is multiplied for the gradients is the block of logits itself,
    since nothing is computed in between.
    """

    @torch.no_grad()
    def __init__(self, problem: Problem, chunk_size: int):
        scored = problem.labels.flatten() != losses.IGNORE
        self._chunk_size = chunk_size
        self._hidden = problem.hidden.flatten(0, 1)[scored]  # [t, d]
        self._teacher_hidden = problem.teacher_hidden.flatten(0, 1)[scored]  # [t, d_t]
        self._weight, self._teacher_weight = problem.head.weight, problem.teacher_head.weight
        self._logits, self._teacher_logits = (self._hidden.new_zeros(chunk_size, len(self._weight)) for _ in range(2))
        self._hidden_grad, self._weight_grad = torch.zeros_like(self._hidden), torch.zeros_like(self._weight)

    @torch.no_grad()
    def __call__(self) -> None:
        columns = (self._hidden, self._teacher_hidden, self._hidden_grad)
        chunks = zip(*(column.split(self._chunk_size) for column in columns), strict=True)
        for hidden, teacher_hidden, hidden_grad in chunks:
            logits, teacher_logits = self._logits[: len(hidden)], self._teacher_logits[: len(hidden)]  # [n, v]
            torch.mm(teacher_hidden, self._teacher_weight.T, out=teacher_logits)
            torch.mm(hidden, self._weight.T, out=logits)
            torch.mm(logits, self._weight, out=hidden_grad)
            self._weight_grad.addmm_(logits.T, hidden)
