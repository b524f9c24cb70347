"""Measure steps that train adapters, beside PEFT's and beside training all weights.

    python tests/benchmarks/adapters.py --dtype bf16

A random Llama is written as a Hugging Face folder, which kdtune and transformers both load, and so is the adapter that
kdtune and PEFT both begin with: rank 16 beside every linear layer but the head. Every variant takes the same steps of
fine-tuning on the same batches; equal losses after several steps show that the same was computed. Memory is above the
loaded models: adapters' gradients, AdamW's moments, activations and the loss. A few minutes on two cores.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import torch
from harness import Answer, Meter, Variant
from pair import IGNORE, LR, batches, write_model
from torch import nn

from kdtune import checkpoint, devices, losses, models, optim


def lora(settings: argparse.Namespace, use_dora: bool) -> models.LoraConfig:
    return models.LoraConfig(rank=settings.rank, alpha=2 * settings.rank, use_dora=use_dora)


def kdtune(settings: argparse.Namespace, kind: str | None) -> Callable[[], float]:
    """The loop of `recipes/finetune.py`, with an adapter of a kind, or with none."""
    dtype, device = devices.DTYPES[settings.dtype], devices.resolve(settings.device)
    model = checkpoint.load_model(settings.models / "student", dtype=dtype, device=device)
    if kind is not None:
        models.add_lora(model, lora(settings, kind == "dora"), seed=0)
        checkpoint.load_adapter(model, settings.models / kind)
    optimizer = optim.build_optimizer(model, optim.OptimizerConfig(lr=LR, weight_decay=0.0, beta2=0.999))
    stream = batches(settings)

    def one_step() -> float:
        tokens, unshifted, _ = (tensor.to(device) for tensor in next(stream))
        labels = nn.functional.pad(unshifted[:, 1:], (0, 1), value=IGNORE)  # [b, s]
        positions = torch.arange(settings.seq_len, device=device).expand_as(tokens)
        num_tokens = int((labels != IGNORE).sum())
        loss = losses.distillation_loss(model.hidden(tokens, positions), model.head, labels, num_tokens)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.total.item()

    return one_step


def peft(settings: argparse.Namespace, kind: str) -> Callable[[], float]:
    """transformers with PEFT, and torch's AdamW."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype, device = devices.DTYPES[settings.dtype], devices.resolve(settings.device)
    base = AutoModelForCausalLM.from_pretrained(settings.models / "student", dtype=dtype).to(device)
    model = PeftModel.from_pretrained(base, settings.models / kind, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    stream = batches(settings)

    def one_step() -> float:
        tokens, labels, mask = (tensor.to(device) for tensor in next(stream))
        loss = model(input_ids=tokens, labels=labels, attention_mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one_step


def variant(title: str, make_step: Callable[[argparse.Namespace], Callable[[], float]]) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        one_step = make_step(settings)
        return partial(Meter(devices.resolve(settings.device)), one_step)

    return Variant(title, make)


VARIANTS = {
    "all": variant("kdtune, all weights", partial(kdtune, kind=None)),
    "lora": variant("kdtune, LoRA", partial(kdtune, kind="lora")),
    "peft-lora": variant("PEFT, LoRA", partial(peft, kind="lora")),
    "dora": variant("kdtune, DoRA", partial(kdtune, kind="dora")),
    "peft-dora": variant("PEFT, DoRA", partial(peft, kind="dora")),
}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings))
    print(
        f"{settings.rows} rows of {settings.seq_len} tokens, vocabulary {settings.vocabulary:,}, width "
        f"{settings.hidden:,}, {settings.layers} layers, rank {settings.rank}, {settings.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "student")
        write_model(base, settings.hidden, settings.layers, settings.vocabulary, seed=0)
        for kind in ("lora", "dora"):
            model = checkpoint.load_model(base, dtype=devices.DTYPES[settings.dtype], device="cpu")
            models.add_lora(model, lora(settings, kind == "dora"), seed=0)
            checkpoint.save_adapter(model, Path(folder, kind), lora(settings, kind == "dora"), base=str(base))
        answers = harness.run(settings, VARIANTS, ["--models", folder])
    first = next(iter(answers.values()))
    rows = [
        [
            VARIANTS[name].title,
            f"{harness.median(found, 'cpu_s'):.3g}",
            f"{harness.ratio(found, first, 'cpu_s'):.2f}",
            f"{harness.median(found, 'memory_mib'):,.0f}",
            f"{found[-1]['result']:.5f}",
        ]
        for name, found in answers.items()
    ]
    last = f"loss of step {settings.rounds + 1}"
    harness.print_table(["", "CPU-s a step", "to the first's", "memory, MiB", last], rows)


if __name__ == "__main__":
    main()
