"""Layers' inputs in host memory, on a CUDA device: the same gradients, and memory that does not grow with the layers.

pytest -m gpu tests/gpu
"""

import pytest
import torch

from kdtune import models
from kdtune.models import Decoder, ModelConfig, RopeConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROWS, LENGTH, WIDTH, LAYERS = 4, 1024, 512, 12


def step(offload, passes=1):
    """Gradients, and the most memory that was in use after the forward above the model's."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        max_seq_len=LENGTH,
        windows=(None,) * LAYERS,
        rope=RopeConfig(),
    )
    model = Decoder(config).to(DEVICE, torch.bfloat16)
    models.enable_activation_checkpointing(model, "full", offload)
    tokens = torch.randint(1000, (ROWS, LENGTH), device=DEVICE)
    for _ in range(passes):
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model.hidden(tokens).float().square().mean()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
    torch.cuda.synchronize()
    return {name: parameter.grad for name, parameter in model.model.named_parameters()}, kept


def test_gradients_are_the_same_and_inputs_are_away():
    expected, kept = step(offload=False)
    found, kept_away = step(offload=True)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    inputs = ROWS * LENGTH * WIDTH * 2  # bytes of a layer's
    assert kept - kept_away >= (LAYERS - 2) * inputs, "all but the last layer's, and the one that leaves"


def test_many_passes_reuse_the_same_memory():
    """A copy that was overtaken by what follows would show in the gradients of a later pass."""
    expected, kept = step(offload=True)
    found, kept_later = step(offload=True, passes=20)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert kept_later == kept
