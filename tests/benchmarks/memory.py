"""Plan a step of Llama 3.1 8B to Llama 3.2 1B with each technique alone and with sums of them; on a GPU, measure it.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --device cuda --rounds 5

Plans are made from the shapes of the models and are for a GPU, which need not be there. With one, each variant also
takes real steps with random weights of these shapes, and the table has their peak, tokens per second, and the share of
the time that the floor of `kdtune plan` would take. Two minutes on two cores.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Answer, Variant

from kdtune import checkpoint, config, data, devices, planning
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.distributed import Ranks

RECIPE = "knowledge_distillation"
LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}

FULL = "enable_activation_checkpointing=true"
IN_BACKWARD = "optimizer_in_bwd=true clip_grad_norm=null"
FEW_BITS = "optimizer.precision=stochastic optimizer.name=adamw_8bit"
NAMED = {  # settings by the variants' short names
    "plain": "",
    "dense": "loss_chunk_size={tokens}",
    "chunk": "loss_chunk_size=256",
    "pieces": "batch_size=1 gradient_accumulation_steps={rows}",
    "selective": f"{FULL} activation_checkpointing_mode=selective",
    "full": FULL,
    "offloaded": f"{FULL} enable_activation_offloading=true",
    "stochastic": "optimizer.precision=stochastic",
    "8bit": "optimizer.name=adamw_8bit",
    "4bit": "optimizer.name=adamw_4bit",
    "optimizer_offload": "optimizer.offload=true",
    "in_bwd": IN_BACKWARD,
    "int8": "teacher.quantization=int8",
    "nf4": "teacher.quantization=nf4",
    "teacher_offload": "teacher.offload=true",
    "lora": "lora.rank=16",
    "qlora": "lora.rank=16 lora.base_quantization=nf4",
    "exact": f"{FULL} {IN_BACKWARD} teacher.offload=true",
    "weights": f"{FULL} {IN_BACKWARD} {FEW_BITS} teacher.quantization=int8",
    "adapter": f"{FULL} lora.rank=16 lora.base_quantization=nf4 teacher.quantization=nf4",
}


def prepare(settings: argparse.Namespace, words: str) -> tuple[Any, Any]:
    """The recipe and its settings."""
    recipe = load_module(catalog.find_recipe(RECIPE))
    common = [
        f"checkpointer.checkpoint_dir={settings.models / 'student'}",
        f"teacher_checkpointer.checkpoint_dir={settings.models / 'teacher'}",
        f"tokenizer.max_seq_len={settings.seq_len}",
        f"batch_size={settings.rows}",
        f"device={'cuda' if settings.device == 'cpu' else settings.device}",
        f"dtype={settings.dtype}",
        "output_dir=unwritten",
    ]
    words = words.format(tokens=settings.rows * settings.seq_len, rows=settings.rows)
    return recipe, config.load(recipe.Config, None, [*common, *words.split()])


def planned(settings: argparse.Namespace, words: str) -> Answer:
    recipe, cfg = prepare(settings, words)
    plan = planning.plan(cfg, recipe.build, recipe.forward_backward, recipe.check_settings)
    fits = [size for size in planning.SIZES if planning.fits(plan, size)]
    answer = {
        "gib": plan.device.total / 2**30,
        "host_gib": plan.host.total / 2**30,
        "work": sum(plan.flops.values()) / plan.floor,
        "fits": min(fits, default=0),
    }
    for accelerator in planning.ACCELERATORS:
        answer[accelerator.name] = planning.seconds(plan, accelerator) or 0.0
    return answer


def measured(settings: argparse.Namespace, words: str) -> Callable[[], Answer]:
    """A call takes a step and gives its time and the peak."""
    recipe, cfg = prepare(settings, words)
    checkpoint.load_model = functools.partial(checkpoint.load_model, random_weights=True)
    device = devices.resolve(settings.device)
    *models, optimizer = recipe.build(cfg, Ranks(device))
    shape = cfg.batch_size, cfg.tokenizer.max_seq_len
    batches = []
    for _ in range(cfg.gradient_accumulation_steps):
        tokens, labels = (torch.randint(LLAMA_1B["vocab_size"], shape) for _ in range(2))
        batches.append(data.Batch(tokens, labels, torch.arange(shape[1]).expand(shape)))
    num_tokens = data.count_labels(batches)

    def step() -> None:
        recipe.forward_backward(cfg, *models, batches, num_tokens)
        optimizer.clip_grad_norm(cfg.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    meter = harness.Meter(device)

    def answer() -> Answer:
        found = meter(step)
        return {"measured_gib": torch.accelerator.max_memory_allocated(device) / 2**30, "wall_s": found["wall_s"]}

    return answer


def variant(words: str) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        plan = planned(settings, words)
        if settings.device == "cpu":
            return lambda: plan
        step = measured(settings, words)
        return lambda: plan | step()

    return Variant(words, make)


VARIANTS = {name: variant(words) for name, words in NAMED.items()}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=1)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(dtype="bf16")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in (("student", LLAMA_1B), ("teacher", LLAMA_8B)):
            Path(folder, name).mkdir()
            Path(folder, name, "config.json").write_text(json.dumps(shape))
        answers = harness.run(settings, VARIANTS, ["--models", folder])
    print()
    is_measured = settings.device != "cpu"
    here = None
    if is_measured:
        name = devices.describe(devices.resolve(settings.device))
        here = next((one for one in planning.ACCELERATORS if one.name.split()[0] in name), None)
    rows = []
    for name, found in answers.items():
        words = NAMED[name].format(tokens=settings.rows * settings.seq_len, rows=settings.rows)
        row = [", ".join(f"`{word}`" for word in words.split()) or "as it is"]
        row += [f"{harness.median(found, 'gib'):.1f}", f"{harness.median(found, 'host_gib'):.1f}"]
        row += [f"{harness.median(found, 'fits'):.0f}", f"{harness.median(found, 'work'):.2f}"]
        if is_measured:
            seconds, num_tokens = harness.median(found, "wall_s"), settings.rows * settings.seq_len
            row += [f"{harness.median(found, 'measured_gib'):.1f}", f"{num_tokens / seconds:,.0f}"]
            row.append("" if here is None else f"{harness.median(found, here.name) / seconds:.0%}")
        rows.append(row)
    header = ["settings", "GiB", "of the host", "fits GB", "work"]
    harness.print_table(header + ["measured GiB", "tokens/s", "of the floor"] * is_measured, rows)


if __name__ == "__main__":
    main()
