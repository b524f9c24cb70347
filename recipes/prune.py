"""Make a smaller model out of a bigger one, by leaving out what counts least on a text.

    kdtune run prune --config quickstart
    kdtune run prune checkpointer.checkpoint_dir=models/Qwen3-8B output_dir=runs/Qwen3-6B \\
        depth.num_layers=30 width.intermediate_size=9216 dataset.source=text.jsonl dataset.format=text
    kdtune run knowledge_distillation checkpointer.checkpoint_dir=runs/Qwen3-6B/model \\
        teacher_checkpointer.checkpoint_dir=models/Qwen3-8B ...

Whole layers are left out, or in every layer channels of the MLP, heads, and channels of the hidden states. What is left
is an ordinary model of the same family, whose weights are those of the bigger one. It has forgotten a good part, and
learns most of it again from the bigger one as its teacher, with a small part of the tokens that a new model would take.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", arXiv:2407.14679 (Minitron);
Sreenivas et al. 2024, arXiv:2408.11796; Men et al. 2024, "ShortGPT", arXiv:2403.03853.
"""

import json
import math
import os
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtune import checkpoint, config, data, devices, losses, metrics, models, preflight, pruning, tokenizers
from kdtune.config import MISSING, setting


@dataclass
class Config:
    """Every setting of this recipe."""

    depth: pruning.DepthConfig = setting(pruning.DepthConfig)  # which layers stay
    width: pruning.WidthConfig = setting(pruning.WidthConfig)  # how wide they stay
    output_dir: str = setting(MISSING, path=True)  # the smaller model goes to its subfolder `model`

    checkpointer: checkpoint.CheckpointerConfig = setting(checkpoint.CheckpointerConfig)  # the bigger model
    tokenizer: tokenizers.TokenizerConfig = setting(tokenizers.TokenizerConfig)  # of the model
    dataset: data.DatasetConfig = setting(data.DatasetConfig)  # the text; best that which the model is distilled on
    num_batches: int = setting(64, gt=0)  # of the text that are read
    batch_size: int = setting(8, gt=0)  # rows of a batch
    seed: int = setting(0, ge=0)  # of which rows are read

    device: str = "cuda"  # cuda, cuda:1, cpu; refused if it is not there
    dtype: devices.Dtype = "bf16"  # of weights and activations; scores are always float32
    save_dtype: devices.Dtype | None = None  # of the written weights; null: dtype
    overwrite_output_dir: bool = False  # delete the run that output_dir holds


def main(cfg: Config) -> None:
    inputs = check(cfg)
    model = checkpoint.load_model(
        cfg.checkpointer.checkpoint_dir,
        dtype=devices.DTYPES[cfg.dtype],
        device=inputs.device,
        adapter_dir=cfg.checkpointer.adapter_dir,
    ).eval()

    found = measure(cfg, inputs, model)
    layers = list(range(model.config.num_layers))
    if cfg.depth.keep_layers is not None:
        layers = cfg.depth.keep_layers
    elif cfg.depth.num_layers is not None:
        layers = pruning.choose_layers(found.layers, len(layers), cfg.depth.num_layers)
    pruned_config = pruning.narrow(checkpoint.select_layers(inputs.model_config, layers), cfg.width)
    target = models.from_hf_config(pruned_config)
    kept = pruning.choose_width(found.statistics, model.config, target, layers)
    print(table(cfg, found, kept))

    pruned = pruning.prune(model, target, kept)
    ce = evaluate(inputs, pruned)
    uniform = math.log(target.vocab_size)
    print(f"cross-entropy of the text: {found.ce:.3f} before, {ce:.3f} after (a uniform guess: {uniform:.3f})")

    output_dir = Path(cfg.output_dir)
    checkpoint.begin(output_dir)
    checkpoint.record(output_dir, config.to_yaml(cfg), recipe=Path(__file__))
    scores = {"ce_before": found.ce, "ce_after": ce, "num_tokens": inputs.num_labels, **record(cfg, found, kept)}
    (output_dir / "importance.json").write_text(json.dumps(scores) + "\n")
    dtype = devices.DTYPES[cfg.save_dtype or cfg.dtype]
    write = partial(checkpoint.save_model, pruned, config=pruned_config, companions=inputs.companions, dtype=dtype)
    folder = checkpoint.write_aside(output_dir / "model", write)
    whole = shlex.quote(cfg.checkpointer.checkpoint_dir)
    print(
        f"{preflight.describe(str(folder), target)}. Let the model that it was teach it:\n"
        f"  kdtune run knowledge_distillation ... checkpointer.checkpoint_dir={shlex.quote(str(folder))} "
        f"teacher_checkpointer.checkpoint_dir={whole}"
    )


@dataclass
class Inputs:
    """What is known before a weight is read."""

    device: torch.device
    model_config: dict[str, Any]  # the bigger model's config.json
    companions: dict[str, bytes]  # files to save beside the weights
    batches: data.ValBatches  # the text
    num_labels: int  # labelled tokens of it


def check(cfg: Config) -> Inputs:
    """Find whatever can be wrong before a weight is read, and say what is going to happen.

    Raises:
        ValueError, OSError: what is wrong, why it matters and what to do.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("prune runs in one process: each of several would choose and write the same. Start one.")
    device = devices.resolve(cfg.device)
    tokenizer_path = cfg.tokenizer.path or cfg.checkpointer.tokenizer_dir
    checkpoint.prepare_output_dir(
        Path(cfg.output_dir),
        resume=None,
        overwrite=cfg.overwrite_output_dir,
        sources=(cfg.checkpointer.checkpoint_dir, cfg.checkpointer.adapter_dir, tokenizer_path),
    )

    model_config = checkpoint.check_model(cfg.checkpointer)
    model = models.from_hf_config(model_config)
    if cfg.depth == pruning.DepthConfig() and not cfg.width.is_given:
        raise ValueError(
            "Nothing is to be left out. Give depth.num_layers or depth.keep_layers, or a size of width: "
            "width.intermediate_size, width.num_heads, width.num_kv_heads, width.hidden_size."
        )
    pruning.check_depth(cfg.depth, model)
    layers = cfg.depth.keep_layers
    if layers is None:  # of those that are chosen only the number is known
        layers = list(range(cfg.depth.num_layers or model.num_layers))
    target = models.from_hf_config(pruning.narrow(checkpoint.select_layers(model_config, layers), cfg.width))
    itemsize = devices.DTYPES[cfg.save_dtype or cfg.dtype].itemsize
    size = models.num_parameters(target) * itemsize
    preflight.check_disk_space(Path(cfg.output_dir), size, has_checkpoints=False)

    tokenizer = tokenizers.load(tokenizer_path)
    preflight.check_vocabulary(tokenizer, model.vocab_size, "model")
    examples, rows = load_text(cfg, tokenizer, model)
    num_labels = int(examples.label_counts[rows].sum())
    print(f"model     {preflight.describe(cfg.checkpointer.checkpoint_dir, model)}")
    print(f"smaller   {preflight.describe(cfg.output_dir + '/model', target)}")
    print(f"text      {len(rows):,} rows, {num_labels:,} labelled tokens, of {examples.summary()}")
    print(f"run       {cfg.dtype} on {device}")
    return Inputs(
        device=device,
        model_config=model_config,
        companions=checkpoint.read_companions(cfg.checkpointer.checkpoint_dir, tokenizer_path),
        batches=data.ValBatches(examples, cfg.batch_size, group_by_length=cfg.dataset.group_by_length, only=rows),
        num_labels=num_labels,
    )


def load_text(cfg: Config, tokenizer: tokenizers.Tokenizer, model: models.ModelConfig) -> tuple[Any, np.ndarray]:
    """All examples, and which of them are read: as many draws as training would make with this seed."""
    if cfg.dataset.packed:
        raise ValueError(
            "dataset.packed=true saves padding in training; here rows are drawn one by one, and the statistics leave "
            "padding out. Leave it out."
        )
    max_seq_len = cfg.tokenizer.max_seq_len
    preflight.check_sequence_length(max_seq_len, "tokenizer.max_seq_len", model, "model")
    examples = data.load(cfg.dataset, tokenizer, max_seq_len, vocab_size=model.vocab_size)
    wanted = cfg.num_batches * cfg.batch_size
    if len(examples) < wanted:
        raise ValueError(
            f"num_batches={cfg.num_batches} of batch_size={cfg.batch_size} are {wanted:,} rows, and the dataset has "
            f"{len(examples):,}. Take num_batches={max(1, len(examples) // cfg.batch_size)}, or more text."
        )
    return examples, examples.order(0, cfg.seed)[:wanted]


@dataclass
class Found:
    """What the text has shown."""

    ce: float  # of the whole model, in nats per token
    statistics: pruning.Statistics
    layers: Tensor  # scores of layers, or of blocks by their first layer
    num_layers: int
    block_size: int  # layers that were judged together


@torch.no_grad()
def measure(cfg: Config, inputs: Inputs, model: models.Decoder) -> Found:
    """Read the text once, without each layer or block too if their importance is that of perplexity."""
    size = pruning.block_size(cfg.depth, model.config)
    statistics = pruning.Statistics(model, aggregation=cfg.width.aggregation or "l2", block_size=size)
    total = torch.zeros((), device=inputs.device)
    is_perplexity = cfg.depth.importance == "perplexity"
    rises = torch.zeros(model.config.num_layers - size + 1, device=inputs.device)
    with metrics.token_bar(inputs.num_labels) as bar:
        for batch in inputs.batches:
            is_read = pruning.read_tokens(batch.labels)
            num_labels, batch = batch.num_labels, batch.to(inputs.device)
            with statistics.watch(is_read):
                ce = cross_entropy(model, batch)
            total += ce
            for start in range(len(rises)) if is_perplexity else ():
                with pruning.without_layers(model, start, size):
                    rises[start] += cross_entropy(model, batch) - ce
            bar.update(num_labels)
    mean = float(total) / inputs.num_labels
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"The cross-entropy of the model is {mean}, so that its scores mean nothing. Either its weights are "
            f"broken, or dtype={cfg.dtype} cannot hold its activations: try bf16 or fp32."
        )
    scores = rises / inputs.num_labels if is_perplexity else statistics.layers()
    return Found(mean, statistics, scores, model.config.num_layers, size)


@torch.no_grad()
def evaluate(inputs: Inputs, model: models.Decoder) -> float:
    """Cross-entropy of the text, in nats per labelled token."""
    total = torch.zeros((), device=inputs.device)
    for batch in inputs.batches:
        total += cross_entropy(model, batch.to(inputs.device))
    return float(total) / inputs.num_labels


def cross_entropy(model: models.Decoder, batch: data.Batch) -> Tensor:
    """Sum over the labelled tokens of a batch, in nats."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.documents)  # [b, s, d]
    return losses.distillation_loss(hidden, model.head, batch.labels, 1, scored=batch.scored).ce


def parts(found: Found, kept: pruning.Kept) -> dict[str, tuple[Tensor, Tensor]]:
    """Of what becomes narrower, by name: all scores, and the indices that stay."""
    scored = {
        "heads": (found.statistics.heads, kept.heads),
        "mlp": (found.statistics.mlp_channels, kept.mlp),
        "hidden": (found.statistics.hidden_channels, kept.hidden),
    }
    return {name: (scores(), stay) for name, (scores, stay) in scored.items() if stay is not None}


def table(cfg: Config, found: Found, kept: pruning.Kept) -> str:
    """The score of each layer, and how much of the scores of its heads and channels stays."""
    shares = {
        name: scores.gather(-1, stay).sum(-1) / scores.sum(-1) for name, (scores, stay) in parts(found, kept).items()
    }
    hidden = shares.pop("hidden", None)
    block = f" of the {found.block_size} from it" * (found.block_size > 1)
    title = f"  importance: {cfg.depth.importance or 'cosine'}{block}"
    lines = ["".join(["layer", title, f"{'':>8}", *(f"{name:>8}" for name in shares)])]
    for layer in range(found.num_layers):
        score = f"{found.layers[layer]:.4f}" if layer < len(found.layers) else ""
        stays = layer in kept.layers
        cells = [f"{share[layer]:>8.1%}" if stays else f"{'':>8}" for share in shares.values()]
        lines.append("".join([f"{layer:>5}", score.rjust(len(title)), f"{'stays' if stays else 'goes':>8}", *cells]))
    if hidden is not None:
        lines.append(f"hidden channels: {hidden:.1%} of their scores stay")
    return "\n".join(lines)


def record(cfg: Config, found: Found, kept: pruning.Kept) -> dict[str, Any]:
    """All scores of what was chosen among, and what stays."""
    return {
        "layers": {
            "importance": cfg.depth.importance or "cosine",
            "block_size": found.block_size,
            "scores": rounded(found.layers.tolist()),
            "kept": kept.layers,
        },
        **{
            name: {"scores": rounded(scores.tolist()), "kept": stay.tolist()}
            for name, (scores, stay) in parts(found, kept).items()
        },
    }


def rounded(values: Any) -> Any:
    """Numbers, or lists of such, with five digits."""
    return [rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")
