"""Measure how much memory the objective takes on the CPU, chunked and with all logits at once.

    python tests/benchmarks/loss_memory.py

Each line is a process of its own: forward and backward over so many labelled tokens, and by how much that raised the
process's peak above what the hidden states and the heads themselves take.
"""

import subprocess
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdtune import losses, metrics

VOCABULARY, WIDTH = 32_000, 512


def chunked(hidden: Tensor, head: nn.Linear, teacher_hidden: Tensor, teacher_head: nn.Linear, labels: Tensor) -> Tensor:
    """What the recipes do."""
    return losses.distillation_loss(
        hidden,
        head,
        labels,
        labels.numel(),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        ce_weight=0.5,
        kd_weight=0.5,
    ).total


def dense(hidden: Tensor, head: nn.Linear, teacher_hidden: Tensor, teacher_head: nn.Linear, labels: Tensor) -> Tensor:
    """The same value, with the logits of all tokens."""
    logits = head(hidden).flatten(0, 1)  # [t, v]
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_hidden).flatten(0, 1)  # [t, v]
    ce = F.cross_entropy(logits, labels.flatten())
    kd = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean")
    return 0.5 * ce + 0.5 * kd


def measure(how: str, num_tokens: int) -> str:
    """One line of the table, and what the loss was, since equal values show that the same thing was measured."""
    torch.manual_seed(0)
    hidden = torch.randn(1, num_tokens, WIDTH, requires_grad=True)
    teacher_hidden = torch.randn(1, num_tokens, WIDTH)
    head, teacher_head = (nn.Linear(WIDTH, VOCABULARY, bias=False) for _ in range(2))
    labels = torch.randint(VOCABULARY, (1, num_tokens))
    before = metrics.peak_memory_gib(torch.device("cpu"))
    loss = {"chunked": chunked, "dense": dense}[how](hidden, head, teacher_hidden, teacher_head, labels)
    loss.backward()
    rise = metrics.peak_memory_gib(torch.device("cpu")) - before
    return f"{how:<8}{num_tokens:>8} tokens{rise * 1024:>8.0f} MiB   loss {loss.item():.5f}"


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    else:
        for how, sizes in {"chunked": (1024, 4096, 16384), "dense": (1024, 4096)}.items():
            for size in sizes:
                subprocess.run([sys.executable, __file__, how, str(size)], check=True)
