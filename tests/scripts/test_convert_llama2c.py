"""The converter on a random tiny model in the format of llama2.c, against that format's own arithmetic in numpy."""

import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdtune.checkpoint import load_model, read_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_llama2c.py"
D, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, SEQ = 24, 40, 2, 4, 2, 31, 16
N = D // HEADS


@pytest.fixture(scope="module")
def convert() -> Callable[..., Any]:
    return runpy.run_path(str(SCRIPT))["convert"]


def random_weights(tied: bool) -> dict[str, np.ndarray]:
    """In the order of the file."""
    shapes = {
        "embedding": (VOCAB, D),
        "attention_norm": (LAYERS, D),
        "wq": (LAYERS, HEADS * N, D),
        "wk": (LAYERS, KV_HEADS * N, D),
        "wv": (LAYERS, KV_HEADS * N, D),
        "wo": (LAYERS, D, HEADS * N),
        "mlp_norm": (LAYERS, D),
        "w1": (LAYERS, HIDDEN, D),
        "w2": (LAYERS, D, HIDDEN),
        "w3": (LAYERS, HIDDEN, D),
        "norm": (D,),
        "rope_tables": (2, SEQ, N // 2),
    }
    if not tied:
        shapes["classifier"] = (VOCAB, D)
    random = np.random.default_rng(0)
    return {name: random.normal(0.0, 0.3, shape).astype("<f4") for name, shape in shapes.items()}


def write(path: Path, weights: dict[str, np.ndarray], tied: bool) -> Path:
    header = struct.pack("<7i", D, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB if tied else -VOCAB, SEQ)
    path.write_bytes(header + b"".join(weight.tobytes() for weight in weights.values()))
    (path.parent / "tok.model").write_bytes(b"a tokenizer")
    return path


def logits_of_llama2c(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """What run.c computes: rotation of neighbouring pairs, one query at a time. [s, v]"""

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rotated(x: np.ndarray) -> np.ndarray:  # [s, h, n]
        angles = np.arange(len(x))[:, None] / 10000.0 ** (np.arange(0, N, 2) / N)
        pairs = x.reshape(*x.shape[:-1], N // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
        return np.stack((turned.real, turned.imag), -1).reshape(x.shape)

    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = w["embedding"][tokens]
    for layer in range(LAYERS):
        h = norm(x, w["attention_norm"][layer])
        q = rotated((h @ w["wq"][layer].T).reshape(len(x), HEADS, N))
        k = rotated((h @ w["wk"][layer].T).reshape(len(x), KV_HEADS, N)).repeat(HEADS // KV_HEADS, axis=1)
        v = (h @ w["wv"][layer].T).reshape(len(x), KV_HEADS, N).repeat(HEADS // KV_HEADS, axis=1)
        scores = np.einsum("qhn,khn->hqk", q, k) / np.sqrt(N)
        scores = np.where(np.tri(len(x), dtype=bool), np.exp(scores), 0.0)
        attention = np.einsum("hqk,khn->qhn", scores / scores.sum(-1, keepdims=True), v)
        x = x + attention.reshape(len(x), -1) @ w["wo"][layer].T
        h = norm(x, w["mlp_norm"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["norm"]) @ w.get("classifier", w["embedding"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_computes_the_same(tied: bool, convert: Callable[..., Any], tmp_path: Path) -> None:
    weights = random_weights(tied)
    checkpoint = write(tmp_path / "model.bin", weights, tied)
    convert(checkpoint, tmp_path / "tok.model", tmp_path / "out")
    tokens = [1, 5, 30, 7, 7, 12]
    with torch.no_grad():
        logits = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")(torch.tensor([tokens]))[0]
    np.testing.assert_allclose(logits.numpy(), logits_of_llama2c(weights, tokens), atol=1e-5)
    assert read_config(tmp_path / "out")["tie_word_embeddings"] == tied
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a tokenizer"


def test_refusals(convert: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "model.bin", random_weights(tied=True), tied=True)
    content = checkpoint.read_bytes()
    for wrong, message in ((content[:-4], "incomplete"), (content[:7], "header"), (b"ak42" * 20, "header")):
        checkpoint.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            convert(checkpoint, tmp_path / "tok.model", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(checkpoint, tmp_path / "tok.model", tmp_path / "out")
