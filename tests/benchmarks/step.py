"""Measure whole training steps: both bodies forward, the loss, backward, clipping, AdamW.

    python tests/benchmarks/step.py
    python tests/benchmarks/step.py --variants kdtune trl-gkd trl-distillation

A pair of random Llamas is written as Hugging Face folders, which all tools load, and every variant takes the same steps
on the same batches: a quarter of a row's length is its prompt, and up to half of it is padding; neither is scored. The
objective is forward KL alone, which is what TRL has. Equal norms of the gradient after several steps show that the same
was computed. Ratios are to the first variant. "floor" is the share that the matrix products without which there is no
such step, at the rate of square ones in the same round, have of its time (on a CPU, of processor seconds): neither
padding nor recomputation is among them. "tensors" is the most that tensors take in a step, weights and moments
included. Each variant's process takes 2 GB or more and stays alive to the end, so seven are what runs if none are named
(`WAYS` has all). A quarter of an hour on two cores.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import peers
import torch
from harness import Answer, Meter, Variant
from pair import CLIP, IGNORE, LORA, LR, batches, write_pair
from torch import Tensor, nn

from kdtune import checkpoint, config, data, devices, metrics, models
from kdtune.cli import catalog
from kdtune.cli.recipe import load_module
from kdtune.distributed import Ranks

PRODUCTS = "products"  # the variant that measures the machine


def kdtune(settings: argparse.Namespace, overrides: str) -> Callable[[], float]:
    """The recipe's own model and step."""
    recipe = load_module(catalog.find_recipe("knowledge_distillation"))
    given = [
        f"checkpointer.checkpoint_dir={settings.models / 'student'}",
        f"teacher_checkpointer.checkpoint_dir={settings.models / 'teacher'}",
        *("dataset.source=unread", "output_dir=unwritten"),
        *(f"device={settings.device}", f"dtype={settings.dtype}"),
        *("kd_ratio=1", f"clip_grad_norm={CLIP}"),
        *(f"optimizer.lr={LR}", "optimizer.weight_decay=0", "optimizer.beta2=0.999"),
    ]
    cfg = config.load(recipe.Config, None, [*given, *overrides.split()])
    device = devices.resolve(cfg.device)
    student, teacher, optimizer = recipe.build(cfg, Ranks(device))
    stream = batches(settings)

    def step() -> float:
        tokens, unshifted, _ = next(stream)
        labels = nn.functional.pad(unshifted[:, 1:], (0, 1), value=IGNORE)  # [b, s]
        batch = data.Batch(tokens, labels, torch.arange(settings.seq_len).expand_as(tokens))
        recipe.forward_backward(cfg, student, teacher, [batch], batch.num_labels, progress=1.0)
        norm = optimizer.clip_grad_norm(cfg.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()

    return step


def clock(settings: argparse.Namespace) -> str:
    """What tells how long the device works: on a CPU, processor seconds, which bear other programs."""
    return "cpu_s" if settings.device == "cpu" else "wall_s"


def multiply(settings: argparse.Namespace) -> Callable[[], Answer]:
    """Seconds of a floating point operation in products of square matrices: the machine's rate."""
    n, device = 1024, devices.resolve(settings.device)
    a, b = torch.randn(2, n, n, device=device).to(devices.DTYPES[settings.dtype])
    meter = Meter(device)

    def product() -> None:
        for _ in range(3):
            a @ b

    return lambda: {"s_per_flop": min(meter(product)[clock(settings)] for _ in range(5)) / (3 * 2 * n**3)}


def least_flop(settings: argparse.Namespace, lora: bool) -> float:
    """Floating point operations of the products that no way to take such a step can leave out."""
    stream = batches(settings)
    taken = [next(stream) for _ in range(settings.rounds + 2)]
    lengths = torch.cat([mask.sum(-1) for _, _, mask in taken]).double()  # of each row
    num_tokens, num_labels = lengths.sum(), sum((labels != IGNORE).sum() for _, labels, _ in taken)
    # In products of the size of a forward. Of frozen weights there is no gradient.
    flop = torch.zeros((), dtype=torch.float64)
    for name, passes in (("teacher", 1), ("student", 2 if lora else 3)):
        shape = models.from_hf_config(checkpoint.read_config(settings.models / name))
        weights = sum(torch.Size(size).numel() for size in models.quantized_shapes(shape).values())
        # Scores and values, of which causality asks for half.
        attended = (
            shape.num_layers * shape.num_heads * shape.head_dim * lengths.square().sum() * (3 if passes > 1 else 1)
        )
        head = shape.vocab_size * shape.hidden_size
        flop += 2 * passes * (num_tokens * weights + num_labels * head) + 2 * attended
    return float(flop) / len(taken)


def peak_tensor_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most that tensors take in a step: those there are before it, and what it adds by the allocator's record."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        step()
        return round(metrics.peak_memory_gib(device) * 2**30)
    is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor  # around another, left by torch.func
    found = (one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter))
    tensors = [one for one in found if not is_wrapper(one) and one.is_cpu]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) + harness.most_allocated(step)


def variant(title: str, make_step: Callable[[argparse.Namespace], Callable[[], float]]) -> Variant:
    def make(settings: argparse.Namespace) -> Callable[[], Answer]:
        device = devices.resolve(settings.device)
        step, meter = make_step(settings), Meter(device)
        tensors_mib = 0.0

        def measure() -> Answer:
            nonlocal tensors_mib
            if not tensors_mib:  # in the first call, which is not counted: it makes moments, and code where it compiles
                step()
                tensors_mib = peak_tensor_bytes(step, device) / 2**20
                return {}
            return {**meter(step), "tensors_mib": tensors_mib}

        return measure

    return Variant(title, make)


@dataclass(frozen=True)
class Way:
    """Of taking a step."""

    variant: Variant
    lora: bool = False


def ours(name: str = "", overrides: str = "", lora: bool = False) -> Way:
    title = ", ".join(["kdtune", *["LoRA"] * lora, *[name] * bool(name)])
    adapter = f" lora.rank={LORA.rank} lora.alpha={LORA.alpha} lora.target_modules=[{','.join(LORA.target_modules)}]"
    return Way(variant(title, partial(kdtune, overrides=overrides + adapter * lora)), lora)


def theirs(name: str = "", lora: bool = False, **options: bool) -> Way:
    title = ", ".join(["torchtune", *["LoRA"] * lora, *[name] * bool(name)])
    return Way(variant(title, partial(peers.torchtune, lora=lora, **options)), lora)


CHECKPOINTING = "enable_activation_checkpointing=true"
SELECTIVE = f"{CHECKPOINTING} activation_checkpointing_mode=selective"
WAYS = {
    "kdtune": ours(),
    "kdtune-compiled": ours("compiled", "compile=true"),
    "kdtune-selective": ours("selective checkpointing", SELECTIVE),
    "kdtune-full": ours("full checkpointing", CHECKPOINTING),
    "kdtune-8bit": ours("8-bit AdamW", "optimizer.name=adamw_8bit"),
    "kdtune-small": ours(
        "full checkpointing, 8-bit AdamW, chunks of 64", f"{CHECKPOINTING} optimizer.name=adamw_8bit loss_chunk_size=64"
    ),
    "kdtune-lora": ours(lora=True),
    "kdtune-lora-compiled": ours("compiled", "compile=true", lora=True),
    "torchtune": theirs(),
    "torchtune-full": theirs("full checkpointing", checkpointing=True),
    "torchtune-compiled": theirs("compiled", compile=True),
    "torchtune-lora": theirs(lora=True),
    "torchtune-lora-compiled": theirs("compiled", lora=True, compile=True),
    "trl-gkd": Way(variant("TRL GKDTrainer", peers.trl_gkd)),
    "trl-distillation": Way(variant("TRL DistillationTrainer", peers.trl_distillation)),
}
USUAL = ["torchtune", "torchtune-lora", "kdtune", "kdtune-compiled", "kdtune-full", "kdtune-small", "kdtune-lora"]
VARIANTS = {name: way.variant for name, way in WAYS.items()} | {PRODUCTS: Variant("a product", multiply)}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=256, help="width of the student")
    parser.add_argument("--teacher-hidden", type=int, default=512, help="width of the teacher")
    parser.add_argument("--layers", type=int, default=4, help="of either model")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(variants=USUAL)
    settings = harness.parse(parser, VARIANTS)
    settings.variants = [*settings.variants, PRODUCTS]

    positions = settings.rows * settings.seq_len
    print(harness.describe_machine(settings))
    print(
        f"{settings.rows} rows of {settings.seq_len} tokens, vocabulary {settings.vocabulary:,}, width "
        f"{settings.hidden:,} / {settings.teacher_hidden:,}, {settings.layers} layers, {settings.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings.models = Path(folder)
        write_pair(settings, settings.models)
        answers = harness.run(settings, VARIANTS, ["--models", folder])
        least = {lora: least_flop(settings, lora) for lora in (False, True)}
    products = answers.pop(PRODUCTS)
    rate = 1e-9 / harness.median(products, "s_per_flop")
    print(f"Products at {rate:,.0f} GFLOP/s; a step has at least {least[False] / 1e9:,.0f} GFLOP, ", end="")
    print(f"with LoRA {least[True] / 1e9:,.0f}\n")
    first = next(iter(answers.values()))
    rows = []
    for name, found in answers.items():
        floors = [{clock(settings): one["s_per_flop"] * least[WAYS[name].lora]} for one in products]
        rows.append(
            [
                VARIANTS[name].title,
                f"{positions / harness.median(found, 'wall_s'):,.0f}",
                f"{harness.median(found, 'cpu_s'):.3g}",
                f"{harness.ratio(first, found, 'wall_s'):.2f}",
                f"{harness.ratio(floors, found, clock(settings)):.0%}",
                f"{harness.median(found, 'tensors_mib'):,.0f}",
                f"{harness.ratio(found, first, 'tensors_mib'):.2f}",
                f"{found[-1]['result']:.5f}",
            ]
        )
    header = ["", "tokens/s", "CPU-s a step", "tokens/s, to the first's", "floor", "tensors, MiB", "to the first's"]
    harness.print_table([*header, "norm of the gradient"], rows)


if __name__ == "__main__":
    main()
