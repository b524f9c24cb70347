"""Measure how fast answers of multiple-choice questions are scored, beside lm-evaluation-harness's own `hf` model.

    python tests/benchmarks/scoring.py --threads 1

Questions of the quickstart's validation rows with four answers each, behind some worked examples or none, with the
quickstart's teacher. Tokens are those of all requests, as if each were computed by itself; texts are encoded in the
measured time. Two minutes on a core.
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Answer, Variant

import kdtune
from kdtune import checkpoint, devices, tokenizers

QUICKSTART = Path(kdtune.__file__).parent / "assets" / "quickstart"
LENGTH = 512


def questions(settings: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs of context and continuation: the first sentences of the answers to this and to three other questions."""
    with gzip.open(QUICKSTART / "validation.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    firsts = [row["answer"].split("\n")[0] for row in rows]
    shown = zip(rows[: settings.shots], firsts, strict=False)
    examples = "".join(f"Question: {row['question']}\nAnswer: {first}\n\n" for row, first in shown)
    asked = range(settings.shots, settings.shots + settings.questions)
    contexts = {i: f"{examples}Question: {rows[i]['question']}\nAnswer:" for i in asked}
    return [(contexts[i], f" {firsts[(i + other) % len(rows)]}") for i in asked for other in range(4)]


def instances(settings: argparse.Namespace) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, one, 0, ("questions", i, 1)) for i, one in enumerate(questions(settings))]


def ours(settings: argparse.Namespace, shares: bool) -> Callable[[], list[tuple[float, bool]]]:
    from kdtune.evaluation import scoring
    from kdtune.evaluation.harness import HarnessModel

    if not shares:
        scoring._WORTH_KEEPING = 2**62
    model = checkpoint.load_model(
        QUICKSTART / "teacher", dtype=devices.DTYPES[settings.dtype], device=devices.resolve(settings.device)
    )
    tokenizer = tokenizers.load(QUICKSTART / "teacher")
    asked = HarnessModel(model, tokenizer, max_seq_len=LENGTH, max_tokens=settings.max_tokens, progress=False)
    return lambda: asked.loglikelihood(instances(settings))


def theirs(settings: argparse.Namespace, batch_size: int) -> Callable[[], list[tuple[float, bool]]]:
    import transformers
    from lm_eval.models.huggingface import HFLM

    folder, dtype = QUICKSTART / "teacher", devices.DTYPES[settings.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(devices.resolve(settings.device))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = HFLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=LENGTH, softmax_dtype=torch.float32)
    return lambda: asked.loglikelihood(instances(settings), disable_tqdm=True)


def variant(title: str, make_asked: Callable[..., Callable[[], list[tuple[float, bool]]]], **how: Any) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        tokenizer = tokenizers.load(QUICKSTART / "teacher")
        num_tokens = sum(len(tokenizer.encode(context + answer)) for context, answer in questions(settings))
        ask, meter = make_asked(settings, **how), harness.Meter(devices.resolve(settings.device))
        found: list[tuple[float, bool]] = []

        def call() -> None:
            found[:] = ask()

        def measure() -> Answer:
            answer = meter(call)
            mean = float(np.mean([log_likelihood for log_likelihood, _ in found]))
            return {**answer, "mean": mean, "tokens": num_tokens}

        return measure

    return Variant(title, make)


VARIANTS: dict[str, Variant] = {
    "kdtune": variant("kdtune", ours, shares=True),
    "apart": variant("kdtune, each request by itself", ours, shares=False),
    "hf-1": variant("lm-eval `hf`, batch_size=1", theirs, batch_size=1),
    "hf-8": variant("lm-eval `hf`, batch_size=8", theirs, batch_size=8),
    "hf-64": variant("lm-eval `hf`, batch_size=64", theirs, batch_size=64),
}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--shots", type=int, default=2, help="worked examples before each question, the same ones")
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=2048, help="that kdtune computes at a time")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings) + "\n")
    rows = []
    for name, found in harness.run(settings, VARIANTS).items():
        num_tokens, seconds = found[0]["tokens"], harness.median(found, "cpu_s")
        if settings.device != "cpu":
            seconds = harness.median(found, "wall_s")
        rows.append([VARIANTS[name].title, f"{seconds:.2f}", f"{num_tokens / seconds:,.0f}", f"{found[0]['mean']:.4f}"])
    harness.print_table([f"{settings.shots} worked examples", "s", "tokens/s", "mean log-likelihood"], rows)


if __name__ == "__main__":
    main()
