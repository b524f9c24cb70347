"""Turn a checkpoint of llama2.c (https://github.com/karpathy/llama2.c, version 0 format) into a Hugging Face folder.

    python scripts/convert_llama2c.py stories260K.bin tok512.model stories260K/

The TinyStories models in this format are small real teachers.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kdtune.checkpoint import save_model
from kdtune.models import Decoder, ModelConfig, from_hf_config

BOS, EOS = 1, 2  # of every sentencepiece model that llama2.c trains


def convert(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Write `folder` from a llama2.c `.bin` and its sentencepiece `tokenizer.model`.

    Raises:
        ValueError: not a version 0 file, or one of another length than its header says.
        FileExistsError: `folder` exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already. Remove it, or choose another folder.")
    hf_config, weights = read_llama2c(checkpoint)
    model = Decoder(from_hf_config(hf_config))
    model.load_state_dict(weights)
    save_model(model, folder, config=hf_config)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **tokens})
    # Stories follow each other with a bos between them and no eos, so a bos ends a story.
    _write(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": [EOS, BOS]})


def read_llama2c(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `config.json` and the weights, named and laid out as Hugging Face does."""
    with checkpoint.open("rb") as stream:
        header = np.fromfile(stream, dtype="<i4", count=7).tolist()
        if len(header) < 7 or not (0 < header[3] <= header[0] < 2**16 and 0 < header[2] < 2**10):
            raise ValueError(f"{checkpoint} is not a version 0 checkpoint of llama2.c: its header makes no sense.")
        d, hidden, layers, heads, kv_heads, vocab, seq_len = header
        hf_config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": abs(vocab),
            "hidden_size": d,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": seq_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": vocab > 0,  # a negative size says that the classifier is stored
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        config = from_hf_config(hf_config)
        expected = 28 + 4 * sum(int(np.prod(shape)) for _, shape in _layout(config))
        if checkpoint.stat().st_size != expected:
            raise ValueError(
                f"{checkpoint} has {checkpoint.stat().st_size:,} bytes, and its header promises {expected:,}. It is "
                "incomplete, or in another version of the format."
            )
        weights = dict(_weights(stream, config))
    return hf_config, weights


def _layout(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file; `{}` stands for each layer in turn."""
    c = config
    layers, d, n = c.num_layers, c.hidden_size, c.head_dim
    layer = "model.layers.{}."
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (c.vocab_size, d)),
        (layer + "input_layernorm.weight", (layers, d)),
        (layer + "self_attn.q_proj.weight", (layers, c.num_heads * n, d)),
        (layer + "self_attn.k_proj.weight", (layers, c.num_kv_heads * n, d)),
        (layer + "self_attn.v_proj.weight", (layers, c.num_kv_heads * n, d)),
        (layer + "self_attn.o_proj.weight", (layers, d, c.num_heads * n)),
        (layer + "post_attention_layernorm.weight", (layers, d)),
        (layer + "mlp.gate_proj.weight", (layers, c.intermediate_size, d)),
        (layer + "mlp.down_proj.weight", (layers, d, c.intermediate_size)),
        (layer + "mlp.up_proj.weight", (layers, c.intermediate_size, d)),
        ("model.norm.weight", (d,)),
        ("", (2, c.max_seq_len, n // 2)),  # cosines and sines, which are computed here
    ]
    return layout if c.tie_embeddings else [*layout, ("lm_head.weight", (c.vocab_size, d))]


def _weights(stream: BinaryIO, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, shape in _layout(config):
        weight = torch.from_numpy(np.fromfile(stream, dtype="<f4", count=int(np.prod(shape))).reshape(shape))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _half_rotated(weight, config.head_dim)
        if "{}" in name:
            yield from ((name.format(index), part.clone()) for index, part in enumerate(weight))
        elif name:
            yield name, weight
            if name == "model.embed_tokens.weight" and config.tie_embeddings:
                yield "lm_head.weight", weight


def _half_rotated(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [layers, h * n, d]: llama2.c rotates rows 2i and 2i + 1 of a head, Hugging Face i and i + n / 2."""
    layers, rows, d = weight.shape
    return weight.view(layers, rows // head_dim, head_dim // 2, 2, d).transpose(2, 3).reshape(layers, rows, d)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the .bin file")
    parser.add_argument("tokenizer", type=Path, help="sentencepiece .model file")
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    args = parser.parse_args()
    try:
        convert(args.checkpoint, args.tokenizer, args.folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
