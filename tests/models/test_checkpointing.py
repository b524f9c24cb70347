"""What activation checkpointing keeps and computes again, and that it changes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from watching import LiveBytes, Operators

from kdtune import models
from kdtune.checkpoint import load_model
from kdtune.documents import Documents
from kdtune.models import Decoder, checkpointing

WAYS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "selective": {"mode": "selective"},
    "full": {"mode": "full"},
    "offloaded": {"mode": "full", "offload": True},
}
# Of a row of 12 tokens and one of 5 and 7.
PACKED = Documents.in_rows([[12], [5, 7]])


def load(folder: Path, way: str) -> Decoder:
    model = load_model(folder, dtype=torch.float32, device="cpu")
    if (how := WAYS[way]) is not None:
        models.enable_activation_checkpointing(model, **how)
    return model


def forward(model: Decoder, documents: Documents | None = None) -> Tensor:
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    return model.hidden(tokens, documents=documents).square().mean()


def gradients(model: Decoder, documents: Documents | None = None) -> dict[str, Tensor]:
    forward(model, documents).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("documents", [None, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("way", ["selective", "full", "offloaded"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3-layer_types"])
def test_gradients_are_the_same(
    name: str, way: str, documents: Documents | None, hf_folder: Callable[..., Path]
) -> None:
    plain, checkpointed = load(hf_folder(name), "none"), load(hf_folder(name), way)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    expected, found = gradients(plain, documents), gradients(checkpointed, documents)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_what_is_computed_again(hf_folder: Callable[..., Path]) -> None:
    """Selectively no product and no attention. In full all of a layer, but for its last product, which nobody reads."""
    folder = hf_folder("llama")
    counts = {}
    for way in WAYS:
        with Operators() as operators:
            gradients(load(folder, way))
        counts[way] = operators.counts
    for name, times, again in (
        ("aten::_scaled_dot_product_flash_attention_for_cpu", 3, {"selective": 0, "full": 3, "offloaded": 3}),
        ("aten::mm", 3 * 7 * 3, {"selective": 0, "full": 3 * 6, "offloaded": 3 * 6}),
        ("aten::silu", 3, {"selective": 3, "full": 3, "offloaded": 3}),
    ):
        assert {way: found[name] - times for way, found in counts.items()} == {"none": 0, **again}, name


def test_what_is_kept(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    kept = {}
    for way in WAYS:
        model = load(folder, way)
        with LiveBytes(model) as live:
            loss = forward(model)
        kept[way] = live.now()
        loss.backward()
    inputs = 2 * 12 * 64 * 4  # bytes of a layer's
    # The rows of the last norm and of cos and sin are kept by each.
    assert kept["full"] < 8 * inputs
    # Of keys and values are half as many, of gate and up half as many again.
    products = 3 * inputs * (1 + 2 * 0.5 + 1 + 1 + 2 * 1.5 + 1)
    assert kept["full"] + products <= kept["selective"] < kept["full"] + 1.02 * products
    assert kept["selective"] < 0.65 * kept["none"]
    assert kept["offloaded"] == kept["full"], "host and device are the same here, and the copy takes as much"


def test_dropout_is_the_same_when_it_is_computed_again(hf_folder: Callable[..., Path]) -> None:
    found = {}
    for way in WAYS:
        model = load_model(hf_folder("llama"), dtype=torch.float32, device="cpu")
        for layer in model.model.layers:
            layer.mlp.down_proj = nn.Sequential(nn.Dropout(0.5), layer.mlp.down_proj)
        model.model.is_random = True
        if (how := WAYS[way]) is not None:
            models.enable_activation_checkpointing(model, **how)
        torch.manual_seed(0)
        found[way] = gradients(model)
    for way in WAYS:
        assert all(torch.equal(found[way][name], expected) for name, expected in found["none"].items()), way


def test_inputs_are_away_until_the_layer_behind_is_reached(
    hf_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host and device are one here; what is watched is which tensor lives, and in which order copies are made."""
    model = load(hf_folder("llama"), "offloaded")
    events: list[str] = []
    inputs: list[StorageWeakRef] = []
    copy = checkpointing._Away._copy

    def watched(away: Any, target: Tensor, source: Tensor) -> None:
        events.append("leaves" if source is away._x else "comes back")
        copy(away, target, source)

    monkeypatch.setattr(checkpointing._Away, "_copy", watched)
    for number, layer in enumerate(model.model.layers):

        def before(_: nn.Module, args: tuple[Tensor], number: int = number) -> None:
            if args[0].untyped_storage()._cdata not in {reference.cdata for reference in inputs}:
                inputs.append(StorageWeakRef(args[0].untyped_storage()))
            events.append(f"layer {number}")

        layer.input_layernorm.register_forward_pre_hook(before)
    loss = forward(model)
    assert [reference.expired() for reference in inputs] == [True, True, False]
    assert events == ["leaves", "layer 0", "leaves", "layer 1", "layer 2"]
    events.clear()
    loss.backward()
    assert events == ["comes back", "layer 2", "comes back", "layer 1", "layer 0"]


def test_an_offloaded_backward_leaves_nothing(hf_folder: Callable[..., Path]) -> None:
    model = load(hf_folder("llama"), "offloaded")
    with LiveBytes(model) as live:
        loss = forward(model)
        loss.backward()
        model.zero_grad()
        assert live.now() == loss.nbytes


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"mode": "selective", "enabled": False}, "enable_activation_checkpointing=false"),
        ({"offload": True, "enabled": False}, "Set enable_activation_checkpointing=true"),
        ({"offload": True, "mode": "selective"}, "activation_checkpointing_mode=full"),
        ({"offload": True, "device": "cpu"}, "device=cpu computes there"),
    ],
)
def test_refused(settings: dict[str, Any], complaint: str) -> None:
    fine = {"enabled": True, "mode": "full", "offload": False, "device": "cuda"}
    changed = fine | settings
    models.check_checkpointing(**fine | {"device": torch.device("cuda")})
    with pytest.raises(ValueError, match=complaint):
        models.check_checkpointing(**changed | {"device": torch.device(changed["device"])})
