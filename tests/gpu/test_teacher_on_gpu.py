"""Teachers on a CUDA device: few bits, layers that come from host memory, a student elsewhere.

pytest -m gpu tests/gpu
"""

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdtune.data import Batch
from kdtune.models import Decoder, Quantization, dequantize, from_hf_config, quantize_linear, quantized_shapes
from kdtune.models.quantization import DYNAMIC
from kdtune.teacher import LiveTeacher

pytestmark = pytest.mark.gpu
KINDS = get_args(Quantization)
CUDA = torch.device("cuda")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def runs_here(kind: str) -> bool:
    needed = {"int8_dynamic": (8, 0), "fp8_dynamic": (8, 9)}.get(kind, (0, 0))
    return torch.cuda.get_device_capability() >= needed


def model_of(kind: Quantization | None, device: torch.device) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(from_hf_config(CONFIG)).to(device, torch.bfloat16).requires_grad_(False)
    for name in quantized_shapes(model.config) if kind else ():
        quantize_linear(model, name.removesuffix(".weight"), model.get_parameter(name), kind)
    return model


def batch() -> Batch:
    tokens = torch.randint(1024, (2, 256), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens, torch.arange(256).expand(2, 256))


@pytest.mark.parametrize("kind", KINDS)
def test_product(kind: Quantization) -> None:
    if not runs_here(kind):
        pytest.skip("an older GPU")
    torch.manual_seed(0)
    weight = torch.randn(256, 512, device=CUDA, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(512, 256, bias=False, device="meta"))
    quantize_linear(model, "0", weight, kind)
    x = torch.randn(300, 512, device=CUDA, dtype=torch.bfloat16, requires_grad=kind not in DYNAMIC)
    with torch.set_grad_enabled(kind not in DYNAMIC):
        out = model(x)
    expected = F.linear(x, dequantize(model[0].weight))
    assert (out - expected).float().norm() < (0.04 if kind in DYNAMIC else 0.005) * expected.float().norm()
    assert (dequantize(model[0].weight) - weight).float().norm() < 0.11 * weight.float().norm()
    if kind not in DYNAMIC:
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.allclose(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_layers_from_host_memory(kind: Quantization | None) -> None:
    if kind is not None and not runs_here(kind):
        pytest.skip("an older GPU")
    model = model_of(kind, torch.device("cpu"))
    size = sum(p.numel() for p in model.model.layers.parameters())
    expected = LiveTeacher(model_of(kind, CUDA), student_device=CUDA)(batch()).hidden
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    teacher = LiveTeacher(copy.deepcopy(model), student_device=CUDA, offload_to=CUDA)
    assert teacher.head.weight is teacher.model.head.weight
    held = torch.cuda.memory_allocated() - before
    assert held < 2.1 * 2 * 1024 * 512 + 2**20, "embedding, head and norm in bf16"
    for _ in range(3):  # of which each reuses the memory of the one before
        # Quantised on the CPU, where rounding may go the other way.
        found = teacher(batch()).hidden
        assert (found - expected).float().norm() < 0.05 * expected.float().norm()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    teacher(batch())
    torch.cuda.synchronize()
    assert kind is not None or torch.cuda.max_memory_allocated() - before < 2 * size / 2  # of six layers in bf16


def test_the_student_is_elsewhere() -> None:
    teacher = LiveTeacher(model_of(None, torch.device("cpu")), student_device=CUDA)
    targets = teacher(batch())
    assert targets.hidden.is_cuda
    assert targets.head.weight.is_cuda
    assert not teacher.model.head.weight.is_cuda
