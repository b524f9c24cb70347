"""A pair of random Llamas, an adapter of the student, and the batches of their steps; the same for every tool."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kdtune import checkpoint, losses, models

IGNORE = losses.IGNORE
LR, CLIP = 1e-4, 1.0
LORA = models.LoraConfig(
    rank=8, alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)


def write_model(folder: Path, width: int, layers: int, vocabulary: int, seed: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = checkpoint.load_model(folder, dtype=torch.float32, device="cpu", random_weights=True, seed=seed)
    checkpoint.save_model(model, folder, config=config)


def batches(settings: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, labels before the shift, and attention mask, [b, s] each; padded on the right, one row full."""
    generator = torch.Generator().manual_seed(0)
    rows, length = settings.rows, settings.seq_len
    while True:
        tokens = torch.randint(2, settings.vocabulary, (rows, length), generator=generator)
        ends = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
        ends[0] = length
        mask = torch.arange(length) < ends
        scored = mask & (torch.arange(length) >= length // 4)
        yield tokens, torch.where(scored, tokens, IGNORE), mask.long()


def write_pair(settings: argparse.Namespace, folder: Path) -> None:
    """student/, teacher/ and adapter/, which begins as kdtune's own with seed 0."""
    sizes = {"student": settings.hidden, "teacher": settings.teacher_hidden}
    for seed, (name, width) in enumerate(sizes.items()):
        write_model(folder / name, width, settings.layers, settings.vocabulary, seed)
    student = checkpoint.load_model(folder / "student", dtype=torch.float32, device="cpu")
    models.add_lora(student, LORA, seed=0)
    checkpoint.save_adapter(student, folder / "adapter", LORA, base="student")
