"""Measure the loss alone: cross-entropy and forward KL, with the gradients of the hidden states and of the head.

    python tests/benchmarks/loss.py
    python tests/benchmarks/loss.py --tokens 512 --vocabulary 32000 --dtype bf16 --ignored 0.5

Printed are seconds, their ratio to the bare matrix products of the same round, and by how much the peak of memory rose
above hidden states and heads: a chunk of logits, say, and the gradients. Every value is compared with one that is
computed separately. About ten minutes on two cores with all peers.
"""

import argparse
from collections.abc import Callable
from functools import partial

import harness
from harness import Answer, Meter, Variant
from objectives import CACHED, OBJECTIVES, BareProducts, Objective, Problem, random_problem, reference

from kdtune import devices

FLOOR = "products"
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of a value that is summed in another order or from rounded logits


def make_problem(settings: argparse.Namespace) -> Problem:
    return random_problem(
        settings.tokens,
        settings.vocabulary,
        settings.hidden,
        settings.teacher_hidden,
        settings.ignored,
        devices.DTYPES[settings.dtype],
        devices.resolve(settings.device),
    )


def variant(objective: Objective) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        # Imports, threads and the compiler take their memory before the peak is noted.
        objective.compute(random_problem(64, 99, 8, 8, 0.0, devices.DTYPES[settings.dtype], settings.device)).backward()
        if objective.compiles:
            harness.load_compiler()
        meter = Meter(devices.resolve(settings.device))

        def measure() -> Answer:
            problem = make_problem(settings)  # anew for each call: between them the memory is left to the others
            if objective.known is not None:
                getattr(problem, objective.known)

            def step() -> float:
                loss = objective.compute(problem)
                loss.backward()
                return loss.item()

            return meter(step)

        return measure

    return Variant(objective.title, make)


def bare_products(settings: argparse.Namespace, chunk_size: int) -> Callable[[], Answer]:
    meter = Meter(devices.resolve(settings.device))
    return lambda: meter(BareProducts(make_problem(settings), chunk_size))


VARIANTS = {
    FLOOR: Variant("bare products, chunks of 256", partial(bare_products, chunk_size=256)),
    "products-512": Variant("bare products, chunks of 512", partial(bare_products, chunk_size=512)),
    **{name: variant(objective) for name, objective in (OBJECTIVES | CACHED).items()},
}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=512, help="width of the student")
    parser.add_argument("--teacher-hidden", type=int, default=1024, help="width of the teacher")
    parser.add_argument("--ignored", type=float, default=0.0, help="share of the tokens without a label")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings))
    print(
        f"{settings.tokens:,} tokens, {settings.ignored:.0%} of them ignored, vocabulary {settings.vocabulary:,}, "
        f"width {settings.hidden:,} / {settings.teacher_hidden:,}, {settings.rounds} rounds\n"
    )
    answers = harness.run(settings, VARIANTS)
    expected = reference(make_problem(settings))
    timings = {"cpu_s": "CPU-s", "wall_s": "s"} if settings.device == "cpu" else {"wall_s": "s"}
    rows = []
    for name, found in answers.items():
        row = [VARIANTS[name].title]
        for key in timings:
            row.append(f"{harness.median(found, key):.3g}")
            row.append(f"{harness.ratio(found, answers[FLOOR], key):.2f}" if FLOOR in answers else "")
        row.append(f"{harness.median(found, 'memory_mib'):,.0f}" if name in OBJECTIVES | CACHED else "")
        rows.append([*row, *value(name, found[-1], expected, TOLERANCE[settings.dtype])])
    ratios = [cell for unit in timings.values() for cell in (unit, f"{unit} / products")]
    harness.print_table(["", *ratios, "memory, MiB", "loss", "which is"], rows)


def value(name: str, answer: Answer, expected: dict[str, float], tolerance: float) -> tuple[str, str]:
    """What came out, and what it is."""
    if "result" not in answer:
        return "", ""
    kind = (OBJECTIVES | CACHED)[name].value
    wrong = abs(answer["result"] - expected[kind]) > tolerance * expected[kind]
    return f"{answer['result']:.5f}", f"NOT {kind}, {expected[kind]:.5f}" if wrong else kind


if __name__ == "__main__":
    main()
