"""Measure what a quantised teacher takes, what it costs in time, and how far it is from the full one.

    python tests/benchmarks/quantization.py

Time is of a forward over random weights, as of a micro-batch; its ratio is to that of the full teacher. The distance is
that of the quickstart's teacher on its validation rows: KL from the full to the quantised one in nats per token, and
how often their first choice is the same. Three minutes on two cores.
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import harness
import torch
from harness import Answer, Variant
from torch import Tensor

import kdtune
from kdtune import checkpoint, devices, losses, models, tokenizers
from kdtune.data import Batch
from kdtune.teacher import LiveTeacher

QUICKSTART = Path(kdtune.__file__).parent / "assets" / "quickstart"


def random_model(settings: argparse.Namespace) -> models.Decoder:
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.hidden * 7 // 2,  # as Llama-3.1-8B
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.hidden // 32,
        "num_key_value_heads": settings.hidden // 128,
        "max_position_embeddings": settings.tokens,
    }
    model = models.Decoder(models.from_hf_config(config))
    return model.to(devices.resolve(settings.device), devices.DTYPES[settings.dtype])


def quantized(model: models.Decoder, kind: models.Quantization | None) -> models.Decoder:
    for name in models.quantized_shapes(model.config) if kind else ():
        models.quantize_linear(model, name.removesuffix(".weight"), model.get_parameter(name).data, kind)
    return model


def layers_bytes(model: models.Decoder) -> float:
    return float(sum(models.num_bytes(model.get_parameter(name)) for name in models.quantized_shapes(model.config)))


def batch_of(tokens: Tensor) -> Batch:
    return Batch(tokens, tokens, torch.arange(tokens.size(1)).expand_as(tokens))


def distance(kind: models.Quantization | None, settings: argparse.Namespace) -> Answer:
    """Of the quickstart's teacher."""
    folder, device = QUICKSTART / "teacher", devices.resolve(settings.device)
    tokenizer = tokenizers.load(folder)
    with gzip.open(QUICKSTART / "validation.jsonl.gz") as file:
        rows = [json.loads(line) for line in file][: settings.rows]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    ids = [tokenizer.encode(text)[:385] for text in texts]
    labels = torch.full((len(ids), max(map(len, ids)) - 1), losses.IGNORE)
    tokens = torch.zeros_like(labels)
    for row, row_ids in enumerate(ids):
        tokens[row, : len(row_ids) - 1] = torch.tensor(row_ids[:-1])
        labels[row, : len(row_ids) - 1] = torch.tensor(row_ids[1:])
    full, few_bits = (
        LiveTeacher(checkpoint.load_model(folder, dtype=torch.float32, device=device, quantization=which))
        for which in (None, kind)
    )
    found = losses.distillation_loss(
        few_bits(batch_of(tokens)).hidden,
        few_bits.head,
        labels.to(device),
        int((labels != losses.IGNORE).sum()),
        full(batch_of(tokens)),
        with_metrics=True,
    )
    return {"kl": found.kd.item(), "agreement": found.agreement.item()}


def variant(title: str, kind: models.Quantization | None) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        device = devices.resolve(settings.device)
        answer = distance(kind, settings)
        if kind == "fp8_dynamic" and device.type == "cpu":  # which is refused: there are no kernels, only a loop
            return lambda: answer | {"bits": 8 + 32 / settings.hidden}
        model = random_model(settings)
        weights = layers_bytes(model) / devices.DTYPES[settings.dtype].itemsize
        teacher, meter = LiveTeacher(quantized(model, kind)), harness.Meter(device)
        answer["bits"] = 8 * layers_bytes(model) / weights
        batch = batch_of(torch.randint(1024, (1, settings.tokens)))

        def forward() -> None:
            teacher(batch)

        return lambda: answer | meter(forward)

    return Variant(title, make)


VARIANTS: dict[str, Variant] = {"full": variant("full", None)}
VARIANTS |= {kind: variant(f"`{kind}`", kind) for kind in get_args(models.Quantization)}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=128, help="of the quickstart's validation")
    parser.set_defaults(dtype="bf16")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings) + "\n")
    answers = harness.run(settings, VARIANTS)

    def shown(name: str, found: list[Answer], key: str, form: Callable[[Any], str]) -> str:
        return form(harness.median(found, key)) if key in found[0] else ""

    rows = []
    for name, found in answers.items():
        is_timed = "cpu_s" in found[0] and "full" in answers
        rows.append(
            [
                VARIANTS[name].title,
                shown(name, found, "bits", lambda bits: f"{bits:.2f}"),
                shown(name, found, "kl", lambda kl: f"{kl:.1e}"),
                shown(name, found, "agreement", lambda share: f"{share:.1%}"),
                shown(name, found, "cpu_s", lambda seconds: f"{seconds:.2f}"),
                f"{harness.ratio(found, answers['full'], 'cpu_s'):.2f}" if is_timed else "",
            ]
        )
    header = ["", "bits a weight", "KL", "same first choice", "CPU-s", "to the full one"]
    harness.print_table(header, rows)


if __name__ == "__main__":
    main()
