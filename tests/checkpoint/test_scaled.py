"""Checkpoints that are quantised already, written by hand in the layouts of their makers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdtune.checkpoint import check_files, load_model, read_config, save_model
from kdtune.models import Decoder, dequantize, from_hf_config, num_bytes, quantized_shapes

E4M3 = torch.float8_e4m3fn
TOKENS = torch.arange(24).view(2, 12)


def by_blocks(weight: Tensor, rows: int, columns: int, most: float) -> tuple[Tensor, Tensor]:
    """A weight in units of each block's scale, and those scales, block after block."""
    n, d = weight.shape
    scaled, scales = torch.empty_like(weight), torch.empty(math.ceil(n / rows), math.ceil(d / columns))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[block].abs().max() / most
            scaled[block] = weight[block] / scales[i, j]
    return scaled, scales


def block_fp8(weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek-V3 and Qwen3-FP8."""
    scaled, scales = by_blocks(weight, 40, 32, 448)
    return {"weight": scaled.to(E4M3), "weight_scale_inv": scales}


def tensor_fp8(weight: Tensor) -> dict[str, Tensor]:
    """Mistral's, with scales of activations."""
    scaled, scales = by_blocks(weight, *weight.shape, 448)
    return {"weight": scaled.to(E4M3), "weight_scale_inv": scales[0, 0].bfloat16(), "activation_scale": torch.ones(())}


def row_fp8(weight: Tensor) -> dict[str, Tensor]:
    """FBGEMM's, as in Llama-3.1-405B-FP8."""
    scaled, scales = by_blocks(weight, 1, weight.shape[1], 448)
    return {"weight": scaled.to(E4M3), "weight_scale": scales}


def modelopt_fp8(weight: Tensor) -> dict[str, Tensor]:
    scaled, scales = by_blocks(weight, *weight.shape, 448)
    return {"weight": scaled.to(E4M3), "weight_scale": scales[0, 0], "input_scale": torch.ones(())}


def compressed_fp8(weight: Tensor) -> dict[str, Tensor]:
    scaled, scales = by_blocks(weight, 1, weight.shape[1], 448)
    return {"weight": scaled.to(E4M3), "weight_scale": scales.bfloat16(), "k_scale": torch.ones(1)}


def compressed_int8(weight: Tensor) -> dict[str, Tensor]:
    scaled, scales = by_blocks(weight, 1, weight.shape[1], 127)
    return {"weight": scaled.round().to(torch.int8), "weight_scale": scales.bfloat16()}


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "symmetric": True, "strategy": "channel", "dynamic": False, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


FORMATS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "deepseek": (
        block_fp8,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [40, 32]},
    ),
    "mistral": (tensor_fp8, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "fbgemm": (row_fp8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt": (modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    "compressed-fp8": (compressed_fp8, compressed("float", type="float")),
    "compressed-int8": (compressed_int8, compressed("int", type="int")),
}


@pytest.fixture
def quantised(hf_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """The tiny Llama in one of the formats: all linear weights but the head's."""

    def make(name: str) -> Path:
        folder = hf_folder("llama")
        function, config = FORMATS[name]
        weights: dict[str, Tensor] = {}
        for key, weight in load_file(folder / "model.safetensors").items():
            if weight.dim() == 2 and ".layers." in key:
                weights |= {key.removesuffix("weight") + part: value for part, value in function(weight).items()}
            else:
                weights[key] = weight.bfloat16()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = read_config(folder) | {"quantization_config": config}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def load(folder: Path, **settings: Any) -> Decoder:
    return load_model(folder, **{"dtype": torch.float32, "device": "cpu", **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_their_numbers_stand_for(
    name: str, dtype: torch.dtype, quantised: Callable[[str], Path], hf_folder: Callable[..., Path]
) -> None:
    folder = quantised(name)
    stored, found, original = load_file(folder / "model.safetensors"), load(folder, dtype=dtype), load(hf_folder())
    for key in quantized_shapes(found.config):
        codes = stored[key].float()
        scale = stored.get(key + "_scale", stored.get(key + "_scale_inv")).float().reshape(-1)
        rows, columns = (40, 32) if name == "deepseek" else (len(codes) // len(scale), codes.shape[1])
        row, column = torch.arange(len(codes))[:, None] // rows, torch.arange(codes.shape[1]) // columns
        expected = codes * scale[row * math.ceil(codes.shape[1] / columns) + column]
        assert torch.equal(found.get_parameter(key), expected.to(dtype))
        error = (expected - original.get_parameter(key)).norm() / original.get_parameter(key).norm()
        assert 0 < error < 0.04
    with torch.no_grad():
        full, ours = original(TOKENS).log_softmax(-1), found(TOKENS).float().log_softmax(-1)
    assert 0 < (full.exp() * (full - ours)).sum(-1).mean() < 0.01


def test_blocks_are_those_of_transformers(quantised: Callable[[str], Path]) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scaled, scales = by_blocks(weight, 32, 32, 448)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(scaled.to(E4M3), scales, torch.bfloat16)

    folder, name = quantised("deepseek"), "model.layers.0.mlp.down_proj.weight"
    weights = load_file(folder / "model.safetensors")
    assert weights[name].shape == weight.shape
    for key, value in FORMATS["deepseek"][0](weight).items():
        weights[name.removesuffix("weight") + key] = value
    config = read_config(folder)
    config["quantization_config"]["weight_block_size"] = [32, 32]
    (folder / "config.json").write_text(json.dumps(config))
    for key in [key for key in weights if key.endswith("_inv")]:
        codes, scale = by_blocks(
            weight if name in key else weights[key.removesuffix("_scale_inv")].float(), 32, 32, 448
        )
        weights[key.removesuffix("_scale_inv")], weights[key] = codes.to(E4M3), scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(folder, dtype=torch.bfloat16).get_parameter(name), theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_fp8_stays_fp8_where_it_is_asked_for(name: str, quantised: Callable[[str], Path]) -> None:
    folder = quantised(name)
    unpacked, kept = load(folder), load(folder, quantization="fp8")
    for key in quantized_shapes(kept.config):
        weight = kept.get_parameter(key)
        assert num_bytes(weight) < 1.1 * weight.numel()
        # Blocks that do not end where the weight does, and integers, are rounded again.
        is_kept = name != "compressed-int8" and (name != "deepseek" or len(weight) % 40 == 0)
        expected = unpacked.get_parameter(key)
        assert torch.equal(dequantize(weight), expected) == is_kept
        assert (dequantize(weight) - expected).norm() < 0.03 * expected.norm()


def test_a_student_that_starts_there_is_saved_as_what_it_is(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    folder = quantised("deepseek")
    model = load(folder)
    save_model(model, tmp_path / "saved", config=read_config(folder))
    assert "quantization_config" not in read_config(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, quant_algo NVFP4"),
        (compressed("pack", type="int", num_bits=4, strategy="group", group_size=32), "format pack-quantized"),
        (compressed("int", type="int", symmetric=False), "8 bits, asymmetric"),
        (compressed("float", type="float") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed("float", type="float") | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_formats_are_refused(config: dict[str, Any], words: str, hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"quantization_config": config}))
    with pytest.raises(ValueError, match=f"is quantised .*{words}.*Use the checkpoint that it was made from"):
        check_files(folder, from_hf_config(read_config(folder)))


def test_tensors_of_torchaos_own_are_refused(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    (folder / "config.json").write_text(json.dumps(read_config(folder) | config))
    load(folder)  # whose weights are ordinary: torchao was to quantise them later
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights["model.layers.0.mlp.down_proj._weight_qdata"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is quantised \(torchao\)"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights, key: weights.pop(key), "is stored as F8_E4M3 without .*weight_scale"),
        (lambda weights, key: weights.update({key: torch.ones(3, 2)}), r"its scales are \[3, 2\] of F32, .*40 x 32"),
        (lambda weights, key: weights.update({key: torch.ones(2, 2).int()}), "of I32"),
    ],
)
def test_broken_scales_are_refused(
    change: Callable[[dict[str, Tensor], str], Any], words: str, quantised: Callable[[str], Path]
) -> None:
    folder = quantised("deepseek")
    weights = load_file(folder / "model.safetensors")
    change(weights, "model.layers.1.self_attn.q_proj.weight_scale_inv")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load(folder)
