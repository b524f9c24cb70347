"""Measure the error of the divergence's gradient as student and teacher come close, against float64.

    python tests/benchmarks/gradient_error.py

The gradient is a difference of two probabilities, so that an error of the logits which the loss does not show becomes
most of the gradient once the two are nearly equal. Student and teacher share a head here; the teacher's hidden states
are the student's plus noise. Printed is |gradient - exact| / |exact| for the hidden states and for the head's weight,
where the exact one is of the same rounded inputs. Two minutes on two cores.
"""

import argparse
from collections.abc import Callable

import harness
import torch
from harness import Answer, Variant
from objectives import OBJECTIVES, Objective, Problem, dense
from torch import Tensor, nn

from kdtune import devices


def make_problem(settings: argparse.Namespace, distance: float) -> Problem:
    """`distance` is the size of the noise in units of the hidden states."""
    torch.manual_seed(0)
    tokens, vocabulary, width = settings.tokens, settings.vocabulary, settings.hidden
    dtype, device = devices.DTYPES[settings.dtype], devices.resolve(settings.device)
    hidden = torch.randn(1, tokens, width, device=device).to(dtype)
    teacher_hidden = (hidden.float() + distance * torch.randn_like(hidden, dtype=torch.float32)).to(dtype)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype, device=device)
    nn.init.normal_(head.weight, std=2 / width**0.5)  # logits of standard deviation 2, as trained models have
    labels = torch.randint(vocabulary, (1, tokens), device=device)
    teacher_head = nn.Linear(width, vocabulary, bias=False, dtype=dtype, device=device).requires_grad_(False)
    teacher_head.weight.copy_(head.weight)
    return Problem(hidden.requires_grad_(), head, teacher_hidden, teacher_head, labels, ce_weight=0.0, kd_weight=1.0)


def gradients(compute: Callable[[Problem], Tensor], problem: Problem) -> tuple[float, Tensor, Tensor]:
    """The loss, and the gradients of hidden states and weight in float64."""
    loss = compute(problem)
    hidden_grad, weight_grad = torch.autograd.grad(loss, [problem.hidden, problem.head.weight])
    return loss.item(), hidden_grad.double(), weight_grad.double()


def in_float64(problem: Problem) -> Problem:
    hidden, teacher_hidden = problem.hidden.detach().double(), problem.teacher_hidden.double()
    head, teacher_head = problem.head.double(), problem.teacher_head.double()
    return Problem(hidden.requires_grad_(), head, teacher_hidden, teacher_head, problem.labels, 0.0, 1.0)


def variant(objective: Objective) -> Variant:
    def measure(settings: argparse.Namespace) -> Answer:
        answer = {}
        for distance in settings.distances:
            problem = make_problem(settings, distance)
            _, hidden_grad, weight_grad = gradients(objective.compute, problem)
            kd, exact_hidden_grad, exact_weight_grad = gradients(dense, in_float64(problem))
            answer[f"kd {distance}"] = kd
            answer[f"hidden {distance}"] = ((hidden_grad - exact_hidden_grad).norm() / exact_hidden_grad.norm()).item()
            answer[f"weight {distance}"] = ((weight_grad - exact_weight_grad).norm() / exact_weight_grad.norm()).item()
        return answer

    return Variant(objective.title, lambda settings: lambda: measure(settings))


VARIANTS = {name: variant(objective) for name, objective in OBJECTIVES.items()}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--distances", type=float, nargs="+", default=[1.0, 0.3, 0.1, 0.024], help="size of the noise")
    parser.set_defaults(dtype="bf16")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings) + "\n")
    answers = harness.run(settings, VARIANTS)
    one = next(iter(answers.values()))[0]
    rows = [
        [VARIANTS[name].title]
        + [f"{found[kind + str(d)]:.2%}" for d in settings.distances for kind in ("hidden ", "weight ")]
        for name, (found, *_) in answers.items()
    ]
    harness.print_table(
        ["KL =", *(cell for d in settings.distances for cell in (f"{one[f'kd {d}']:.2g}, hidden", "head"))], rows
    )


if __name__ == "__main__":
    main()
