"""Measure for how long training stands still for a checkpoint, written at once or in the background.

    python tests/benchmarks/saving.py

A Llama with random weights in bf16, with AdamW's float32 moments and rests: 12 bytes of a checkpoint for each of its
135 million parameters. "stands still" is what `save` takes, "written" from its beginning to the checkpoint on the disk.
The first save of each, which takes memory from the system, is not counted. Each save replaces the one before, in a
folder under `--output-dir`. Two minutes on two cores.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import harness
import torch
from harness import Answer, Variant

from kdtune import checkpoint, devices, optim
from kdtune.distributed import Ranks


def variant(title: str, in_background: bool) -> Variant:
    def start(settings: argparse.Namespace) -> Callable[[], Answer]:
        folder = tempfile.TemporaryDirectory(dir=settings.output_dir)
        run = make_run(settings, Path(folder.name))

        def measure() -> Answer:
            run.step += 1
            assert folder  # which is deleted with this function
            since = time.perf_counter()
            run.save(in_background)
            saved = time.perf_counter()
            run.wait()
            return {"stands_still": saved - since, "written": time.perf_counter() - since}

        return measure

    return Variant(title, start)


def make_run(settings: argparse.Namespace, folder: Path) -> checkpoint.Run:
    """As after its first step."""
    d, device = settings.hidden, devices.resolve(settings.device)
    config = {
        "model_type": "llama",
        "vocab_size": settings.vocabulary,
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 12,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    checkpoint.huggingface._write_json(folder / "config.json", config)
    dtype = devices.DTYPES[settings.dtype]
    model = checkpoint.load_model(folder, dtype=dtype, device=device, random_weights=True)
    optimizer = optim.build_optimizer(model, optim.OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    cfg = SimpleNamespace(lora=None)
    writer = checkpoint.ModelWriter(model, cfg, config, {}, optimizer.master, Ranks(device))
    return checkpoint.Run(folder / "run", None, writer, optimizer=optimizer)


VARIANTS = {
    "at_once": variant("at once", in_background=False),
    "in_background": variant("`save_in_background=true`", in_background=True),
}


def main() -> None:
    parser = harness.make_parser(__doc__, rounds=5)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--output-dir", help="on the disk to measure; that of temporary files if absent")
    parser.set_defaults(dtype="bf16")
    settings = harness.parse(parser, VARIANTS)

    print(harness.describe_machine(settings) + "\n")
    answers = harness.run(settings, VARIANTS)
    rows = [
        [VARIANTS[name].title, *(f"{harness.median(found, key):.2f}" for key in ("stands_still", "written"))]
        for name, found in answers.items()
    ]
    harness.print_table(["checkpoints", "stands still, s", "written, s"], rows)


if __name__ == "__main__":
    main()
