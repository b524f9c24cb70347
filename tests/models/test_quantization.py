"""Weights in few bits: what they hold, what they compute, what they cost in divergence, and what is refused."""

import copy
import gzip
import json
import subprocess
import sys
from typing import Any, get_args

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune import checkpoint, losses, tokenizers
from kdtune.models import (
    Decoder,
    Quantization,
    QuantizedLinear,
    check_quantization,
    dequantize,
    from_hf_config,
    num_bytes,
    quantize,
    quantize_linear,
    quantized_shapes,
)
from kdtune.models.quantization import DYNAMIC

KINDS = get_args(Quantization)
WEIGHT_ONLY = [kind for kind in KINDS if kind not in DYNAMIC]
CPU = torch.device("cpu")


def layer(kind: Quantization, weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
    n, d = weight.shape
    model = nn.Sequential(nn.Linear(d, n, bias=bias is not None, device="meta"))
    if bias is not None:
        model[0].bias = nn.Parameter(bias, requires_grad=False)
    quantize_linear(model, "0", weight, kind)
    return model[0]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_computes_with_what_its_bits_stand_for(kind: Quantization, dtype: torch.dtype) -> None:
    bias = randn(64, dtype=dtype, seed=2)
    quantized = layer(kind, randn(64, 512, dtype=dtype), bias)
    x = randn(3, 5, 512, dtype=dtype, seed=1)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()

    out, expected = quantized(ours), F.linear(plain, dequantize(quantized.weight), bias)
    assert torch.equal(out, expected)
    for y in (out, expected):
        y.square().sum().backward()
    assert torch.equal(ours.grad, plain.grad)


def test_int8_is_absmax_rounding_of_each_row() -> None:
    weight = randn(16, 24)
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    found = dequantize(quantize(weight, "int8"))
    assert torch.allclose(found / scale, (found / scale).round(), atol=1e-4)
    assert ((found - weight).abs() <= 0.5001 * scale).all()


def test_fp8_is_rounding_to_e4m3_of_each_row() -> None:
    weight = randn(16, 24)
    scale = weight.abs().amax(1, keepdim=True) / 448
    expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.allclose(dequantize(quantize(weight, "fp8")), expected)


def test_int4_has_sixteen_levels_in_each_group_and_the_nearest_is_taken() -> None:
    weight = randn(8, 96)
    groups = weight.view(-1, 32)
    found = dequantize(quantize(weight, "int4")).view(-1, 32)
    for group, values in zip(groups, found, strict=True):
        low, high = group.min().clamp(max=0), group.max().clamp(min=0)
        step = (high - low) / 15
        levels = (torch.arange(16) - (-low / step).round()) * step.bfloat16().float()
        assert torch.allclose((values - group).abs(), (levels - group[:, None]).abs().amin(1), atol=1e-4)  # or a tie


def test_nf4_takes_the_nearest_of_its_levels() -> None:
    """Levels of Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, appendix E; scales up to their own rounding."""
    levels = torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0])
    levels = torch.cat([levels, torch.tensor([0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1])])
    weight = randn(32, 512)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = levels[((blocks / scale)[..., None] - levels).abs().argmin(-1)] * scale
    assert torch.allclose(dequantize(quantize(weight, "nf4")).view(-1, 64), nearest, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_unpacks_to_the_bit_as_torchao_does(kind: Quantization, dtype: torch.dtype) -> None:
    from torchao.quantization import dequantize_affine

    quantized: Any = quantize(randn(512, 32, dtype=dtype), kind)
    if kind == "int4":
        codes = torch.stack([quantized.codes >> 4, quantized.codes & 15], dim=-1).flatten(1)
        parts = (codes, (1, 32), quantized.scale, quantized.zero_point, torch.uint8, 0, 15)
        expected = dequantize_affine(*parts, output_dtype=dtype)
    else:
        expected = quantized.get_original_weight() if kind == "nf4" else quantized.dequantize()
    assert torch.equal(dequantize(quantized), expected)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_dynamic_kinds_round_each_tokens_activations_too(kind: Quantization) -> None:
    quantized, x = layer(kind, randn(32, 64)), randn(20, 64, seed=1)
    absmax = x.abs().amax(1, keepdim=True)
    if kind == "int8_dynamic":
        rounded = dequantize(quantize(x, "int8"))
    else:
        rounded = (x / (absmax / 448)).to(torch.float8_e4m3fn).float() * (absmax / 448)
    with torch.no_grad():
        found = quantized(x)
    assert torch.allclose(found, rounded @ dequantize(quantized.weight).T, atol=1e-4)
    assert not torch.allclose(found, x @ dequantize(quantized.weight).T, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4.75), ("nf4", 4.127), ("int8_dynamic", 8), ("fp8_dynamic", 8)]
)
def test_bits_of_a_weight(kind: Quantization, bits: float) -> None:
    weight = randn(512, 4096, dtype=torch.bfloat16)
    quantized = quantize(weight, kind)
    assert 8 * num_bytes(quantized) / weight.numel() == pytest.approx(bits, abs=0.02)
    assert quantized.shape == weight.shape
    assert num_bytes(weight) == 2 * weight.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_meta_has_the_same_shapes_and_bytes(kind: Quantization) -> None:
    real, meta = layer(kind, randn(64, 512)), layer(kind, torch.empty(64, 512, device="meta"))
    parts = real.weight.__tensor_flatten__()[0]
    assert meta.weight.__tensor_flatten__()[0] == parts
    for name in parts:
        one, other = getattr(real.weight, name), getattr(meta.weight, name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert other.is_meta
    x = torch.empty(2, 7, 512, device="meta", requires_grad=kind in WEIGHT_ONLY)
    with torch.set_grad_enabled(kind in WEIGHT_ONLY):
        out = meta(x)
    assert out.shape == (2, 7, 64)
    if kind in WEIGHT_ONLY:
        out.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_backward_keeps_no_weight(kind: Quantization) -> None:
    """torchao's own products of int8 and fp8 keep the weight that they unpacked: with adapters, a second full model."""
    quantized, kept = layer(kind, randn(64, 512)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        quantized(randn(2, 512).requires_grad_())
    assert not kept


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_the_disk(kind: Quantization, tmp_path: Any) -> None:
    quantized = layer(kind, randn(64, 512))
    torch.save(quantized.state_dict(), tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(dequantize(again["weight"]), dequantize(quantized.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Quantization) -> None:
    quantized = layer(kind, torch.zeros(64, 512))
    assert not dequantize(quantized.weight).any()
    with torch.no_grad():
        assert not layer(kind, randn(64, 512))(torch.zeros(20, 512)).any()


CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def refusal(kind: Quantization, device: str = "cpu", **settings: Any) -> str:
    config = from_hf_config(CONFIG | settings.pop("config", {}))
    settings = {"dtype": torch.bfloat16, "setting": "teacher.quantization", **settings}
    try:
        check_quantization(kind, config, device=torch.device(device), **settings)
    except ValueError as error:
        return str(error)
    return ""


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [kind for kind in KINDS if refusal(kind)] == ["fp8_dynamic"]
    assert "teacher.quantization=fp8_dynamic" in refusal("fp8_dynamic")
    assert not [kind for kind in KINDS if refusal(kind, "meta")]
    assert "float32" in refusal("fp8_dynamic", "meta", dtype=torch.float32)
    assert [kind for kind in KINDS if refusal(kind, "meta", needs_gradient=True)] == list(DYNAMIC)

    narrow = {"config": {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1}}
    assert [kind for kind in KINDS if refusal(kind, "meta", **narrow)] == ["int4", "nf4", *DYNAMIC]
    assert "multiple of 32 columns, and model.layers.0.self_attn.q_proj.weight is 36 x 36" in refusal("int4", **narrow)
    assert "multiple of 16384 weights" in refusal("nf4", **narrow)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert [kind for kind in KINDS if refusal(kind, "cuda")] == ["fp8_dynamic"]
    assert "8.9" in refusal("fp8_dynamic", "cuda")


def test_only_the_layers_linear_weights_are_quantised() -> None:
    config = from_hf_config(CONFIG | {"attention_bias": True})
    names = {name.partition(".layers.")[2] or name for name in quantized_shapes(config)}
    linear = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert names == {f"{index}.{part}.weight" for index in (0, 1) for part in linear}


def test_torchao_is_imported_late_and_quietly() -> None:
    code = (
        "import sys, torch, kdtune.models as m; assert 'torchao' not in sys.modules;"
        "m.quantize(torch.ones(32, 512) , 'int8'); assert 'torchao' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.fixture(scope="module")
def quickstart() -> tuple[Decoder, Tensor, Tensor]:
    """A model that was trained, and some of the text it knows: tokens [b, s] and what is to be predicted from them."""
    folder = tiny_runs.TEACHER_ASSETS
    tokenizer = tokenizers.load(folder)
    with gzip.open(folder.parent / "validation.jsonl.gz") as file:
        rows = [json.loads(next(file)) for _ in range(16)]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    tokens = torch.tensor([tokenizer.encode(text)[:65] for text in texts])
    return checkpoint.load_model(folder, dtype=torch.float32, device="cpu"), tokens[:, :-1], tokens[:, 1:]


# Measured 4e-5, 6e-4, 6e-3, 7e-3, 4e-4, 1.6e-3 on these rows.
@pytest.mark.parametrize(
    ("kind", "most"),
    [("int8", 1e-4), ("fp8", 1e-3), ("int4", 0.01), ("nf4", 0.012), ("int8_dynamic", 1e-3), ("fp8_dynamic", 3e-3)],
)
def test_stays_close_to_the_trained_model(
    kind: Quantization, most: float, quickstart: tuple[Decoder, Tensor, Tensor]
) -> None:
    full, tokens, labels = quickstart
    quantized = copy.deepcopy(full)
    for name in quantized_shapes(full.config):
        quantize_linear(quantized, name.removesuffix(".weight"), full.get_parameter(name), kind)
    with torch.no_grad():
        targets = losses.Targets(full.hidden(tokens), full.head)
        found = losses.distillation_loss(
            quantized.hidden(tokens), quantized.head, labels, labels.numel(), targets, kd_weight=1, with_metrics=True
        )
    assert found.teacher_ce < 3
    assert 0 < found.kd < most
    assert found.kd > most / 20, "the bound is one that a worse rounding would break"
