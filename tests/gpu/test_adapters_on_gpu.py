"""Adapters on a CUDA device: the same numbers to begin with, float32 logits of a head with one, and dropout again.

pytest -m gpu tests/gpu
"""

import pytest
import torch

from kdtune import losses, models
from kdtune.models import Decoder, LoraConfig, ModelConfig, trained_parameters

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(512, 64, 96, 2, 4, 2, 16, 64, (None, None))
TOKENS = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))


def adapted(device, dtype, **settings):
    torch.manual_seed(0)
    model = Decoder(CONFIG).to(device, dtype)
    models.add_lora(model, LoraConfig(**{"rank": 8, "target_modules": ["all-linear", "lm_head"], **settings}), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(device)
    return model


def gradients(model):
    tokens = TOKENS.to(model.head.weight.device)
    losses.distillation_loss(model.hidden(tokens), model.head, tokens, tokens.numel()).total.backward()
    return {name: parameter.grad.cpu() for name, parameter in trained_parameters(model).items()}


def test_a_new_adapter_is_that_of_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        model = Decoder(CONFIG).to(device)
        models.add_lora(model, LoraConfig(rank=8), seed=3)
        found[device] = {name: parameter.detach().cpu() for name, parameter in trained_parameters(model).items()}
    assert all(torch.equal(found["cuda"][name], found["cpu"][name]) for name in found["cpu"])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_are_those_of_the_cpu(dtype, bound, use_dora):
    settings = {"use_dora": True, "target_modules": ["all-linear"]} if use_dora else {}
    found, expected = (
        gradients(adapted("cuda", dtype, **settings)),
        gradients(adapted("cpu", torch.float32, **settings)),
    )
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < bound * gradient.norm(), name


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_layers_drop_the_same_again(mode):
    plain, checkpointed = (adapted("cuda", torch.float32, dropout=0.5) for _ in range(2))
    models.enable_activation_checkpointing(checkpointed, mode)
    found = []
    for model in (plain, checkpointed):
        torch.manual_seed(7)
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
