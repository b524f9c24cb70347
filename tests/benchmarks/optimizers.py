"""Measure what a step of each optimizer costs: time, bytes that stay, bytes that come and go.

    python tests/benchmarks/optimizers.py

Matrices and norms of a Llama with random numbers as bf16 weights and gradients, about 47 million; nothing but the step
is computed. "state" is what stays of a weight beyond itself and its gradient, "memory" by how much the process's peak
rises in a step. `torch` is torch.optim.AdamW of bf16 weights, as most tools have it, `torchao` is AdamW8bit with
stochastic rounding, compiled in its first step. Five minutes on two cores.
"""

import argparse
from collections.abc import Callable

import harness
import torch
from harness import Answer, Meter, Variant
from torch import Tensor

from kdtune import devices, optim
from kdtune.optim import OptimizerConfig

BETAS = (0.9, 0.95)


def make_parameters(settings: argparse.Namespace) -> torch.nn.ParameterList:
    d = settings.hidden
    layer = [(d, d), (d // 4, d), (d // 4, d), (d, d), (4 * d, d), (4 * d, d), (d, 4 * d), (d,), (d,)]
    torch.manual_seed(0)
    dtype = devices.DTYPES[settings.dtype]
    shapes = [(settings.vocabulary, d), *(layer * settings.layers)]
    parameters = torch.nn.ParameterList(torch.randn(*shape).to(settings.device, dtype) for shape in shapes)
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape) * 1e-3).to(settings.device, dtype)
    return parameters


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all that has a value for each weight or block of weights."""
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    parts = [
        [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if type(tensor) is not Tensor else [tensor]
        for tensor in tensors
    ]
    return sum(tensor.nbytes for group in parts for tensor in group)


def variant(title: str, make: Callable[[torch.nn.ParameterList], torch.optim.Optimizer]) -> Variant:
    def start(settings: argparse.Namespace) -> Callable[[], Answer]:
        parameters = make_parameters(settings)
        optimizer = make(parameters)
        optimizer.step()
        state = state_bytes(optimizer) / sum(parameter.numel() for parameter in parameters)
        meter = Meter(devices.resolve(settings.device))

        def measure() -> Answer:
            return {**meter(lambda: optimizer.step()), "state": state}

        return measure

    return Variant(title, start)


def ours(**choice: str) -> Variant:
    title = ", ".join(f"`optimizer.{key}={value}`" for key, value in choice.items())
    return variant(title, lambda parameters: optim.build_optimizer(parameters, OptimizerConfig(**choice)))


def torchao(parameters: torch.nn.ParameterList) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, betas=BETAS, bf16_stochastic_round=True)


VARIANTS = {
    "torch": variant("torch.optim.AdamW", lambda p: torch.optim.AdamW(p, betas=BETAS, fused=True)),
    "nearest": ours(name="adamw", precision="nearest"),
    "fp32": ours(name="adamw", precision="fp32"),
    "stochastic": ours(name="adamw", precision="stochastic"),
    **{
        f"{bits}_{precision}": ours(name=f"adamw_{bits}", precision=precision)
        for bits in ("8bit", "4bit", "fp8")
        for precision in ("fp32", "stochastic")
    },
    "torchao": variant("torchao.optim.AdamW8bit", torchao),
}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.set_defaults(dtype="bf16")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings) + "\n")
    answers = harness.run(settings, VARIANTS)
    rows = [
        [
            VARIANTS[name].title,
            f"{harness.median(found, 'state'):.2f}",
            f"{harness.median(found, 'cpu_s'):.2f}",
            f"{harness.median(found, 'wall_s'):.2f}",
            f"{harness.median(found, 'memory_mib'):.0f}",
        ]
        for name, found in answers.items()
    ]
    harness.print_table(["", "state, bytes", "CPU-s", "s", "memory, MiB"], rows)


if __name__ == "__main__":
    main()
