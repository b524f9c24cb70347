"""Rounding in training: what it does to the forward, the gradient and the model that comes out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdtune.models import Decoder, QATConfig, check_qat, convert_qat, from_hf_config, prepare_qat, quantized_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(24).view(2, 12)
SCHEMES = [
    QATConfig("int4"),
    QATConfig("int4", group_size=16),
    QATConfig("int8"),
    QATConfig("int4", activations="int8"),
    QATConfig("int8", activations="int8"),
]
schemes = pytest.mark.parametrize("cfg", SCHEMES, ids=str)


def make(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(from_hf_config(CONFIG | changes)).to(dtype)


def rounded(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.to(scale.dtype).unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@schemes
def test_converted_is_what_was_trained(cfg: QATConfig, dtype: torch.dtype) -> None:
    """Rounded once and for all, weights give the same logits to the bit; activations are rounded as they come."""
    model = make(dtype)
    names = [name for name, _ in model.named_parameters()]
    prepare_qat(model, cfg)
    assert [name for name, _ in model.named_parameters()] == names
    plain = make(dtype)
    for name in quantized_shapes(model.config):
        codes, scale = convert_qat(model.get_parameter(name), cfg)
        assert codes.dtype == torch.int8
        assert codes.min().item() >= -(2 ** (cfg.bits - 1))
        assert codes.max().item() < 2 ** (cfg.bits - 1)
        assert scale.dtype == dtype
        plain.get_parameter(name).data = rounded(codes, scale)
    with torch.no_grad():
        found, exact = model(TOKENS), plain(TOKENS)
        if cfg.activations is None:
            assert torch.equal(found, exact)
        else:
            error = (found - exact).float().norm() / exact.float().norm()
            assert 0 < error < 0.05, "of activations alone"


@schemes
def test_converted_is_torchaos(cfg: QATConfig) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig as TorchaoConfig

    from kdtune.models.qat import _base_config

    model = make()
    prepare_qat(model, cfg)
    theirs = copy.deepcopy(model)
    quantize_(theirs.model.layers, TorchaoConfig(_base_config(cfg), step="convert"))
    for name in quantized_shapes(model.config):
        codes, scale = convert_qat(model.get_parameter(name), cfg)
        assert torch.equal(theirs.get_parameter(name).qdata, codes)
        assert torch.equal(theirs.get_parameter(name).scale, scale)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), theirs(TOKENS))


def test_scales_and_integers() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = convert_qat(weight, QATConfig("int4", group_size=32))
    groups = weight.view(3, 2, 32)
    assert torch.allclose(scale, groups.abs().amax(-1) / 7.5)
    assert (groups - rounded(codes, scale).view(3, 2, 32)).abs().max() <= 0.501 * scale.max()
    assert not convert_qat(torch.zeros(2, 32), QATConfig())[0].any()


def test_head_and_embedding_stay() -> None:
    for tied in (True, False):
        model = make(tie_word_embeddings=tied)
        prepare_qat(model, QATConfig())
        assert type(model.lm_head) is nn.Linear
        assert type(model.model.embed_tokens) is nn.Embedding
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@schemes
def test_gradient_passes_through_the_rounding(cfg: QATConfig) -> None:
    """It is that of the layer with rounded weights, at the weights before."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 8, bias=False), torch.randn(5, 64)
    model = make()
    model.model.layers = nn.ModuleList([nn.Sequential(linear)])
    weight = linear.weight
    prepare_qat(model, cfg)
    model.model.layers[0](x).square().sum().backward()

    plain = nn.Linear(64, 8, bias=False)
    plain.weight.data = rounded(*convert_qat(weight, cfg))
    plain(x).square().sum().backward()
    # What lies beyond the last level is cut off, and has no gradient.
    passed = weight.grad != 0
    assert passed.float().mean() > 0.9
    if cfg.activations is None:
        assert torch.allclose(weight.grad[passed], plain.weight.grad[passed], atol=1e-5)


def test_trains_to_what_rounding_alone_does_not_reach() -> None:
    """Where inputs go together, as activations do, errors of weights can make up for each other."""
    torch.manual_seed(0)
    target, x = torch.randn(8, 32), torch.randn(512, 4) @ torch.randn(4, 32)
    cfg = QATConfig("int4")
    model = make()
    linear = nn.Linear(32, 8, bias=False)
    linear.weight.data = target.clone()
    model.model.layers = nn.ModuleList([nn.Sequential(linear)])
    prepare_qat(model, cfg)

    def error() -> Tensor:
        return (model.model.layers[0](x) - x @ target.T).square().mean()

    before = error().item()
    optimizer = torch.optim.Adam(model.model.layers.parameters())
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 200)
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error() < 0.5 * before


def test_on_meta() -> None:
    model = make().to("meta")
    prepare_qat(model, QATConfig(activations="int8"))
    assert model(TOKENS.to("meta")).shape == (2, 12, 97)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_is_refused() -> None:
    alone = {"has_adapter": False, "dtype": "bf16", "save_dtype": None}
    for cfg, changes, words in (
        (QATConfig("int8", group_size=32), {}, "with qat.weights=int8 a row has one scale"),
        (QATConfig("int4"), {"intermediate_size": 72}, "64 x 72, and its columns have to be a multiple of 32"),
        (QATConfig("int8"), {"intermediate_size": 68}, "64 x 68, and its columns"),
        (QATConfig("int4", group_size=48), {}, "64 x 64, and its columns have to be a multiple of 48"),
    ):
        with pytest.raises(ValueError, match=words):
            check_qat(cfg, from_hf_config(CONFIG | changes), **alone)
    check_qat(QATConfig("int8"), from_hf_config(CONFIG | {"intermediate_size": 72}), **alone)
    check_qat(QATConfig(), from_hf_config(CONFIG), **alone | {"save_dtype": "bf16"})
    for others, words in (
        ({"has_adapter": True}, "with lora those stay as they are"),
        ({"save_dtype": "fp32"}, "save_dtype=fp32 would round the scales"),
    ):
        with pytest.raises(ValueError, match=words):
            check_qat(QATConfig(), from_hf_config(CONFIG), **alone | others)
