"""The decoder against transformers, on tiny random models of every family and rope variant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdtune import models
from kdtune.checkpoint import load_model
from kdtune.documents import Documents
from kdtune.models import Decoder, KVCache, RopeConfig

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}  # on logits of about 3
LENGTHS = (30, 5, 17)  # beyond the dynamic variant's 16 positions, and beyond every sliding window


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(folder, dtype=dtype, device="cpu")


def random_rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def expected_alone(oracle: Callable[..., Any], variant: str, rows: list[Tensor]) -> list[Tensor]:
    """Logits [s, v] of each row by itself, from transformers."""
    return [oracle(variant)(row[None]).logits[0] for row in rows]


@torch.no_grad()
def test_logits_equal_transformers(variant: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path]) -> None:
    tokens = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = oracle(variant)(tokens).logits
    assert expected.abs().max() > 2, "too flat to tell anything"
    torch.testing.assert_close(load(hf_folder(variant))(tokens), expected, **TOLERANCE)


@torch.no_grad()
def test_right_padding_changes_nothing(
    variant: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path]
) -> None:
    rows = random_rows()
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    documents = Documents.in_rows([length] for length in LENGTHS)
    model = load(hf_folder(variant))
    # With dynamic rope padding counts as length unless it is marked.
    ways = [documents] if model.config.rope.type == "dynamic" else [documents, None]
    for way in ways:
        logits = model(tokens, documents=way)
        for index, expected in enumerate(expected_alone(oracle, variant, rows)):
            torch.testing.assert_close(logits[index, : len(expected)], expected, **TOLERANCE)


@torch.no_grad()
def test_left_padding_changes_nothing(variant: str, oracle: Callable[..., Any], hf_folder: Callable[..., Path]) -> None:
    rows = random_rows()
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    documents = Documents.in_rows([max(LENGTHS) - length, length] for length in LENGTHS)
    logits = load(hf_folder(variant))(tokens, documents=documents)
    assert logits.isfinite().all()
    for index, expected in enumerate(expected_alone(oracle, variant, rows)):
        torch.testing.assert_close(logits[index, -len(expected) :], expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("given_positions", [False, True])
def test_packed_documents_equal_themselves_alone(
    variant: str, given_positions: bool, oracle: Callable[..., Any], hf_folder: Callable[..., Path]
) -> None:
    rows = random_rows()
    tokens = torch.cat([*rows, torch.zeros(4, dtype=torch.int64)])[None]
    documents = Documents.in_rows([LENGTHS], tokens.size(1))
    positions = torch.cat([torch.arange(len(row)) for row in [*rows, range(4)]])[None] if given_positions else None
    logits = load(hf_folder(variant))(tokens, positions=positions, documents=documents)[0]
    for piece, expected in zip(logits.split([*LENGTHS, 4]), expected_alone(oracle, variant, rows), strict=False):
        torch.testing.assert_close(piece, expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-llama3", "qwen2", "qwen3", "mistral-sliding"])
def test_bfloat16_rounds_where_transformers_does(name: str, hf_folder: Callable[..., Path]) -> None:
    import transformers

    tokens = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    folder = hf_folder(name)
    # Read from disk, because `.to(bfloat16)` would round the oracle's rope as well.
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(load(folder, torch.bfloat16)(tokens), reference(tokens).logits)


@torch.no_grad()
def test_cached_decoding_equals_full_forward(variant: str, hf_folder: Callable[..., Path]) -> None:
    model = load(hf_folder(variant))
    if model.config.rope.type == "dynamic":
        pytest.skip("a key keeps the angle that it got when the sequence was shorter, as in transformers")
    rows = random_rows((12, 9, 20))
    prompts = (7, 3, 10)
    tokens = torch.zeros(3, max(prompts), dtype=torch.int64)
    for index, (row, length) in enumerate(zip(rows, prompts, strict=True)):
        tokens[index, :length] = row[:length]
    cache = KVCache(20)
    model(tokens, cache=cache)
    for chunk in (1, 1, 2, 1):  # several tokens at once too
        offset = cache.length - max(prompts)
        positions = torch.tensor(prompts)[:, None] + torch.arange(offset, offset + chunk)
        step = torch.stack([row[place] for row, place in zip(rows, positions, strict=True)])
        logits = model(step, positions=positions, cache=cache)
        for index, row in enumerate(rows):
            last = int(positions[index, -1]) + 1
            torch.testing.assert_close(logits[index], model(row[None, :last])[0, -chunk:], **TOLERANCE)


def test_gradients_equal_transformers(hf_folder: Callable[..., Path], oracle: Callable[..., Any]) -> None:
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    model, reference = load(hf_folder("qwen3-tied_biases")), oracle("qwen3-tied_biases")
    model(tokens).log_softmax(-1)[..., 3].mean().backward()
    reference(tokens).logits.log_softmax(-1)[..., 3].mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_float64_is_not_rounded_to_float32(hf_folder: Callable[..., Path]) -> None:
    tokens = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(1))
    model = load(hf_folder("qwen3"), torch.float64)
    nudged = load(hf_folder("qwen3"), torch.float64)
    nudged.model.embed_tokens.weight += 1e-11
    change = (model(tokens) - nudged(tokens)).abs().max()
    assert 0 < change < 1e-8


def test_head_is_the_embedding_if_tied(hf_folder: Callable[..., Path]) -> None:
    model = load(hf_folder("llama-tied"))
    assert model.head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_low_precision_leaves_rope_alone(hf_folder: Callable[..., Path]) -> None:
    model = load(hf_folder("llama"))
    before = model.model.rope.inv_freq.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.model.rope.inv_freq, before)


def test_positions_count_from_each_document() -> None:
    found = Documents.in_rows([[2, 3, 1], [3, 1]])
    assert found.positions().tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 1]]
    assert found.lengths_of_tokens().tolist() == [[2, 2, 3, 3, 3, 1], [3, 3, 3, 1, 2, 2]]


def test_counting_parameters_builds_none_and_keeps_the_random_state() -> None:
    config = models.ModelConfig(
        vocab_size=10**6,
        hidden_size=2**16,
        intermediate_size=2**18,
        num_layers=2,
        num_heads=512,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=1024,
        windows=(None, None),
        rope=RopeConfig(),
    )
    state = torch.get_rng_state()
    assert models.num_parameters(config) > 10**11
    assert torch.equal(torch.get_rng_state(), state)
