"""Packed rows go through a model without a wait for the device: on `meta` there is nothing to wait for, so that whoever
asks a tensor for its values, or for a shape that depends on them, is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdtune import data
from kdtune.models import Decoder, ModelConfig, RopeConfig, attention, enable_activation_checkpointing

ROWS = [[5, 1, 12, 2], [20], [3, 4]]
LAYERS = {
    "plain": (None, None),
    "sliding": (4, 4),
    "sliding layers": (7, None),
}
ROPES = {"default": RopeConfig(), "dynamic": RopeConfig(type="dynamic", factor=2.0, original_max_seq_len=8)}


def make_model(windows: tuple[int | None, ...], rope: RopeConfig) -> Decoder:
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_layers": 2, "max_seq_len": 32}
    with torch.device("meta"):
        return Decoder(ModelConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=8, windows=windows, rope=rope))


def make_batch() -> data.Batch:
    return data.collate_packed(
        [
            [(torch.ones(length, dtype=torch.int64), torch.ones(length, dtype=torch.int64)) for length in row]
            for row in ROWS
        ]
    )


class NoCopies(TorchDispatchMode):
    """Refuses what reads or makes a tensor elsewhere: on a GPU it would be a copy, which waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, Tensor) or tensor.is_meta, f"{func} on {tensor.device}"
        return out


def kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, *longest: int, **_: Any
) -> Tensor:
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.shape == cu_seq_k.shape == (7 + 1 + 1,), "seven documents and the padding of a row"
    assert longest == (20, 20)
    return query * key.sum() * value.sum()


@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("layers", LAYERS)
def test_no_step_waits_for_the_device(
    layers: str, rope: str, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_kernel:
        monkeypatch.setattr(attention, "has_varlen_kernel", lambda like, head_dim: True)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    model = make_model(LAYERS[layers], ROPES[rope])
    enable_activation_checkpointing(model)
    batch = make_batch().to("meta")
    model.hidden(batch.tokens, batch.positions, batch.documents)  # the first forward takes the frequencies along
    with NoCopies():
        model.hidden(batch.tokens, batch.positions, batch.documents).sum().backward()
        model.hidden(batch.tokens, documents=batch.documents)


def test_a_wait_would_be_told() -> None:
    tensor = torch.ones(3, device="meta")
    for wait in (Tensor.tolist, Tensor.nonzero, lambda tensor: tensor.sum().item(), lambda tensor: bool(tensor[0])):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait(tensor)
    with NoCopies(), pytest.raises(AssertionError, match="cpu"):
        torch.ones(3).to("meta")
