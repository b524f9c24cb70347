"""What modules put out, as outputs of a forward: the same as hooks see, whatever computes it, and gone afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from watching import LiveBytes
from ways import WAYS, checkpointed, plain

from kdtune import checkpoint
from kdtune.documents import Documents
from kdtune.models import (
    Decoder,
    LoraConfig,
    add_lora,
    head_names,
    module_names,
    stream_layers,
)

TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    oracle("qwen3").save_pretrained(made)
    return made


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Decoder:
    return checkpoint.load_model(folder, dtype=dtype, device="cpu")


def by_hooks(model: Decoder, names: list[str], *args: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
        for name in names
    ]
    model.hidden(*args)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_module(folder: Path) -> None:
    """Also of packed rows."""
    model = load(folder)
    names = module_names(model.config)
    assert len(names) == 2 + 5 * 3
    packed = Documents.in_rows([[5, 7], [12]])
    for args in ((TOKENS,), (TOKENS, packed.positions(), packed)):
        expected = by_hooks(model, names, *args)
        hidden, found = model.hidden_states(*args, wanted=names)
        assert torch.equal(hidden, model.hidden(*args))
        assert list(found) == names
        assert all(torch.equal(found[name], expected[name]) for name in names)


def test_heads(folder: Path) -> None:
    """Queries and keys behind their norms, which see each head by itself, and values."""
    model = load(folder)
    names = head_names(model.config)
    assert list(names.values()) == [4 * 24, 2 * 24, 2 * 24] * 3
    _, found = model.hidden_states(TOKENS, wanted=names)
    sources = {"queries": "q_norm", "keys": "k_norm", "values": "v_proj"}
    for name, heads in found.items():
        layer, _, kind = name.rpartition(".")
        (expected,) = by_hooks(model, [f"{layer}.{sources[kind]}"], TOKENS).values()
        assert heads.shape == (2, 12, names[name] // 24, 24)
        assert torch.equal(heads.flatten(2), expected.flatten(2))


def test_hidden_states_of_transformers(oracle: Callable[..., Any], folder: Path) -> None:
    """Its `hidden_states`: embeddings, then layers; the last is after the norm."""
    model = load(folder, torch.float32)
    with torch.no_grad():
        expected = oracle("qwen3")(TOKENS, output_hidden_states=True).hidden_states
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    _, found = model.hidden_states(TOKENS, wanted=names)
    for name, other in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], other, rtol=1e-4, atol=1e-5)


WANTED = [
    *("model.layers.0.mlp", "model.layers.0.self_attn.keys", "model.layers.0.self_attn.values"),
    *("model.layers.1", "model.layers.1.self_attn", "model.layers.2.input_layernorm"),
]


def adapted(model: Decoder) -> None:
    add_lora(model, LoraConfig(rank=4), seed=0)


@pytest.mark.parametrize("change", WAYS)
def test_values_and_gradients_are_those_of_a_plain_model(change: Callable[[Decoder], None], folder: Path) -> None:
    found = {}
    for name, how in (("plain", plain), ("changed", change)):
        model = load(folder)
        how(model)
        hidden, captured = model.hidden_states(TOKENS, wanted=WANTED)
        loss = hidden.square().sum() + sum(state.square().sum() * i for i, state in enumerate(captured.values(), 1))
        loss.backward()
        grads = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        found[name] = [hidden, captured, grads]
    torch.testing.assert_close(found["changed"], found["plain"], rtol=1e-10, atol=1e-12)


def test_a_model_whose_layers_are_in_host_memory(folder: Path) -> None:
    model, streamed = load(folder), load(folder).requires_grad_(False)
    stream_layers(streamed, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(
            streamed.hidden_states(TOKENS, wanted=WANTED), model.hidden_states(TOKENS, wanted=WANTED)
        )


@pytest.mark.parametrize("change", [plain, checkpointed, adapted])
def test_nothing_of_it_stays(change: Callable[[Decoder], None], folder: Path) -> None:
    """Neither of what is wanted nor of the graph, once the caller lets go; without the garbage collector."""
    model = load(folder)
    change(model)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes(model) as live:
            before = live.now()
            for _ in range(3):
                hidden, captured = model.hidden_states(TOKENS, wanted=WANTED)
                assert live.now() > before
                (hidden.sum() + sum(state.sum() for state in captured.values())).backward()
                model.zero_grad(set_to_none=True)
                del hidden, captured
                assert live.now() == before
    finally:
        gc.enable()


def test_a_name_that_is_none(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"model\.layers\.3"):
        load(folder).hidden_states(TOKENS, wanted=["model.layers.3"])
