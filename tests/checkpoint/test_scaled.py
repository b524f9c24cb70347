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
from watching import LiveBytes

from kdtune.checkpoint import check_files, load_model, read_config, save_adapter, save_model
from kdtune.checkpoint.scaled import with_scales
from kdtune.checkpoint.weights import read_header, read_into
from kdtune.models import (
    Decoder,
    LoraConfig,
    add_lora,
    dequantize,
    from_hf_config,
    merged,
    num_bytes,
    quantized_shapes,
    trained_parameters,
)

E4M3 = torch.float8_e4m3fn
TOKENS = torch.arange(24).view(2, 12)


def in_units(weight: Tensor, rows: int, columns: int, most: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in units of its blocks' scales, the scales in `dtype`, and the scale of each number, [n, d]."""
    n, d = weight.shape
    scales, factors = torch.empty(math.ceil(n / rows), math.ceil(d / columns)), torch.empty(n, d)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = factors[block] = (weight[block].abs().max() / most).to(dtype).float()
    return (weight / factors).clamp(-most, most), scales.to(dtype), factors


Stored = tuple[dict[str, Tensor], Tensor]  # what stands in the file for a weight, and the weight that it stands for


def block_fp8(weight: Tensor) -> Stored:
    """DeepSeek-V3 and Qwen3-FP8."""
    scaled, scales, factors = in_units(weight, 40, 32, 448, torch.float32)
    codes = scaled.to(E4M3)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * factors


def tensor_fp8(weight: Tensor) -> Stored:
    """Mistral's, with scales of activations."""
    scaled, scales, factors = in_units(weight, *weight.shape, 448, torch.bfloat16)
    codes = scaled.to(E4M3)
    parts = {"weight": codes, "weight_scale_inv": scales[0, 0], "activation_scale": torch.ones(())}
    return parts, codes.float() * factors


def row_fp8(weight: Tensor) -> Stored:
    """FBGEMM's, as in Llama-3.1-405B-FP8."""
    scaled, scales, factors = in_units(weight, 1, weight.shape[1], 448, torch.float32)
    codes = scaled.to(E4M3)
    return {"weight": codes, "weight_scale": scales}, codes.float() * factors


def modelopt_fp8(weight: Tensor) -> Stored:
    scaled, scales, factors = in_units(weight, *weight.shape, 448, torch.float32)
    codes = scaled.to(E4M3)
    return {"weight": codes, "weight_scale": scales[0, 0], "input_scale": torch.ones(())}, codes.float() * factors


def compressed_fp8(weight: Tensor) -> Stored:
    scaled, scales, factors = in_units(weight, 1, weight.shape[1], 448, torch.bfloat16)
    codes = scaled.to(E4M3)
    return {"weight": codes, "weight_scale": scales, "k_scale": torch.ones(1)}, codes.float() * factors


def compressed_int8(weight: Tensor) -> Stored:
    scaled, scales, factors = in_units(weight, 1, weight.shape[1], 127, torch.bfloat16)
    codes = scaled.round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * factors


def asymmetric(weight: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers [n, d] from -2^(bits - 1), scales and zero points [n, d / columns], and what these stand for."""
    low, high = (edge(weight.unflatten(1, (-1, columns)), 2).clamp(*at) for edge, at in EDGES)
    scales = ((high - low) / (2**bits - 1)).bfloat16()
    zero_points = -(2 ** (bits - 1)) - (low / scales.float()).round()
    factors, zeros = (x.float().repeat_interleave(columns, dim=1) for x in (scales, zero_points))
    codes = ((weight / factors).round() + zeros).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes, scales, zero_points, (codes - zeros) * factors


EDGES = ((torch.amin, (None, 0)), (torch.amax, (0, None)))  # of what the integers span, zero included


def asymmetric_int8(weight: Tensor) -> Stored:
    """With activations of fixed scales."""
    codes, scales, zero_points, expected = asymmetric(weight, 8, weight.shape[1])
    parts = {"weight": codes, "weight_zero_point": zero_points, "input_zero_point": torch.ones(1)}
    parts = {name: part.to(torch.int8) for name, part in parts.items()}
    return parts | {"weight_scale": scales, "input_scale": torch.ones(1)}, expected


def torchao(function: Callable[[Tensor], Stored], weight: Tensor) -> Stored:
    parts, expected = function(weight)
    names = {"weight": "_weight_qdata", "weight_scale": "_weight_scale", "weight_zero_point": "_weight_zero_point"}
    return {name: parts[part] for part, name in names.items() if part in parts}, expected


def words(numbers: Tensor, bits: int) -> Tensor:
    """Integers [n, d] above the least of them in words [n, d * bits / 32], the first in the lowest bits."""
    found = []
    for row in (numbers.long() + 2 ** (bits - 1)).tolist():
        for start in range(0, len(row), 32 // bits):
            word = sum(number << bits * place for place, number in enumerate(row[start : start + 32 // bits]))
            found.append(word - 2**32 * (word >= 2**31))
    return torch.tensor(found, dtype=torch.int32).view(len(numbers), -1)


def packed(weight: Tensor, bits: int, columns: int, symmetric: bool = True) -> Stored:
    """The weight's words run along its rows, those of the zero points down the rows."""
    shape = {"weight_shape": torch.tensor(weight.shape)}
    if not symmetric:
        codes, scales, zero_points, expected = asymmetric(weight, bits, columns)
        zeros = {"weight_zero_point": words(zero_points.T, bits).T.contiguous()}
        return {"weight_packed": words(codes, bits), "weight_scale": scales, **zeros, **shape}, expected
    scaled, scales, factors = in_units(weight, 1, columns, 2 ** (bits - 1) - 1, torch.bfloat16)
    codes = scaled.round()
    return {"weight_packed": words(codes, bits), "weight_scale": scales, **shape}, codes * factors


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "symmetric": True, "strategy": "channel", "dynamic": False, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


FORMATS: dict[str, tuple[Callable[[Tensor], Stored], dict[str, Any]]] = {
    "deepseek": (
        block_fp8,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [40, 32]},
    ),
    "mistral": (tensor_fp8, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "fbgemm": (row_fp8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt": (modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    "compressed-fp8": (compressed_fp8, compressed("float", type="float")),
    "compressed-int8": (compressed_int8, compressed("int", type="int")),
    "packed-int8": (lambda weight: packed(weight, 8, weight.shape[1]), compressed("pack", type="int")),
    "packed-int4": (
        lambda weight: packed(weight, 4, 32),
        compressed("pack", type="int", num_bits=4, strategy="group", group_size=32, actorder=None),
    ),
    "asymmetric-int8": (asymmetric_int8, compressed("int", type="int", symmetric=False)),
    "asymmetric-packed-int4": (
        lambda weight: packed(weight, 4, 32, symmetric=False),
        compressed("pack", type="int", num_bits=4, strategy="group", group_size=32, symmetric=False),
    ),
    "torchao-int8": (lambda weight: torchao(asymmetric_int8, weight), {"quant_method": "torchao"}),
    "torchao-fp8": (lambda weight: torchao(row_fp8, weight), {"quant_method": "torchao"}),
}


Quantised = Callable[[str], tuple[Path, dict[str, Tensor]]]


@pytest.fixture
def quantised(hf_folder: Callable[..., Path]) -> Quantised:
    """The tiny Llama in one of the formats, all linear weights but the head's, and what these stand for."""

    def make(name: str) -> tuple[Path, dict[str, Tensor]]:
        folder = hf_folder("llama")
        function, config = FORMATS[name]
        weights, expected = {}, {}
        for key, weight in load_file(folder / "model.safetensors").items():
            weights[key] = weight.bfloat16()
            if weight.dim() == 2 and ".layers." in key:
                del weights[key]
                parts, expected[key] = function(weight)
                weights |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = read_config(folder) | {"quantization_config": config}
        (folder / "config.json").write_text(json.dumps(config))
        return folder, expected

    return make


def load(folder: Path, **settings: Any) -> Decoder:
    return load_model(folder, **{"dtype": torch.float32, "device": "cpu", **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_their_numbers_stand_for(
    name: str, dtype: torch.dtype, quantised: Quantised, hf_folder: Callable[..., Path]
) -> None:
    folder, expected = quantised(name)
    found, original = load(folder, dtype=dtype), load(hf_folder("llama"))
    assert expected.keys() == quantized_shapes(found.config).keys()
    for key, weight in expected.items():
        assert torch.equal(found.get_parameter(key), weight.to(dtype))
        full = original.get_parameter(key)
        assert 0 < (weight - full).norm() / full.norm() < (0.15 if "int4" in name else 0.04)


def test_blocks_are_those_of_transformers() -> None:
    """Of sizes that divide the weight's: transformers has no others."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(80, 96, generator=torch.Generator().manual_seed(0))
    parts, expected = block_fp8(weight)
    theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    assert torch.equal(theirs, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    parts, expected = packed(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)), bits, 32, symmetric)
    theirs = helpers.unpack_from_int32(parts["weight_packed"], bits, torch.Size((20, 64))).float()
    if not symmetric:
        zero_points = helpers.unpack_from_int32(parts["weight_zero_point"], bits, torch.Size((20, 2)), packed_dim=0)
        theirs -= zero_points.repeat_interleave(32, dim=1)
    assert torch.equal(theirs * parts["weight_scale"].float().repeat_interleave(32, dim=1), expected)


def test_groups_of_several_sizes_in_a_model(quantised: Quantised) -> None:
    folder, expected = quantised("packed-int4")
    weights, key = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    parts, expected[key] = packed(expected[key], 4, 16)
    weights |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_config(folder)
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"weights": groups["group_0"]["weights"] | {"group_size": 16}}
    (folder / "config.json").write_text(json.dumps(config))
    found = load(folder)
    assert all(torch.equal(found.get_parameter(key), weight) for key, weight in expected.items())


def test_only_keys_and_values_are_quantised(hf_folder: Callable[..., Path]) -> None:
    folder = hf_folder("llama")
    plain = load(folder)
    weights = load_file(folder / "model.safetensors")
    for part in ("k_scale", "v_scale", "v_zero_point"):
        weights[f"model.layers.0.self_attn.{part}"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}
    config = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": attention}}
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"quantization_config": config}))
    assert torch.equal(load(folder)(TOKENS), plain(TOKENS))


def test_reading_holds_little_beside_the_weight(tmp_path: Path) -> None:
    """However many scales there are."""
    parts, expected = packed(torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), 4, 32, symmetric=False)
    save_file(parts, tmp_path / "weights.safetensors")
    stored = {f"mlp.{name}": place for name, place in read_header(tmp_path / "weights.safetensors").items()}
    stored = with_scales(tmp_path, stored, {"mlp.weight": (512, 256)}, [(1, 32)])
    target, buffer = torch.empty(512, 256), torch.empty(4096, dtype=torch.uint8)
    with LiveBytes() as live:
        live.peak = 0
        read_into(stored["mlp.weight"], target, buffer)
    assert torch.equal(target, expected)
    scales = 2 * 4 * 512 * 8  # and zero points
    assert live.peak - target.nbytes < 3 * scales < target.nbytes / 2


@pytest.mark.parametrize("name", FORMATS)
def test_fp8_stays_fp8_where_it_is_asked_for(name: str, quantised: Quantised) -> None:
    folder, expected = quantised(name)
    kept = load(folder, quantization="fp8")
    for key, full in expected.items():
        weight = kept.get_parameter(key)
        assert num_bytes(weight) < 1.1 * weight.numel()
        # Blocks that do not end where the weight does, and integers, are rounded again.
        is_kept = "int" not in name and (name != "deepseek" or len(weight) % 40 == 0)
        assert torch.equal(dequantize(weight), full) == is_kept
        assert (dequantize(weight) - full).norm() < 0.03 * full.norm()


def test_an_adapter_is_merged_into_what_numbers_stand_for(quantised: Quantised, tmp_path: Path) -> None:
    folder, weights = quantised("deepseek")
    lora = LoraConfig(rank=4, target_modules=["q_proj"])
    model = load(folder)
    add_lora(model, lora, seed=0)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05
    save_adapter(model, tmp_path, lora, base=str(folder))
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = merged(model, name)
    assert (expected - weights[name]).abs().max() > 0.01
    torch.testing.assert_close(load(folder, adapter_dir=tmp_path).get_parameter(name), expected, atol=1e-6, rtol=0)
    in_few_bits = load(folder, adapter_dir=tmp_path, quantization="fp8").get_parameter(name)
    assert (dequantize(in_few_bits) - expected).norm() < 0.03 * expected.norm(), "not the stored numbers themselves"


def test_a_student_that_starts_there_is_saved_as_what_it_is(quantised: Quantised, tmp_path: Path) -> None:
    folder, _ = quantised("deepseek")
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
        (compressed("nvfp4-pack", type="float", num_bits=4), "format nvfp4-pack-quantized"),
        (compressed("pack", type="int", num_bits=3), "3 bits"),
        (compressed("pack", type="int", num_bits=4, actorder="group"), "actorder group"),
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


@pytest.mark.parametrize("part", ["_weight_act_pre_scale", "weight_g_idx", "weight.absmax"])
@pytest.mark.parametrize("name", ["torchao-int8", "packed-int4"])
def test_parts_that_are_not_known_are_refused(name: str, part: str, quantised: Quantised) -> None:
    folder, _ = quantised(name)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.0.mlp.down_proj.{part}"] = torch.ones(48)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"is quantised \(.*, with model.layers.0.mlp.down_proj.{part}\)"):
        load(folder)


def test_torchao_over_ordinary_weights(hf_folder: Callable[..., Path]) -> None:
    """Which it was to quantise later."""
    folder = hf_folder("llama")
    plain = load(folder)
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    (folder / "config.json").write_text(json.dumps(read_config(folder) | config))
    assert torch.equal(load(folder)(TOKENS), plain(TOKENS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights, key: weights.pop(key), "is stored as F8_E4M3 without .*weight_scale"),
        (lambda weights, key: weights.update({key: torch.ones(3, 2)}), r"its scales are \[3, 2\] of F32, .*40 x 32"),
        (lambda weights, key: weights.update({key: torch.ones(2, 2).int()}), "of I32"),
        (
            lambda weights, key: weights.update({key.replace("scale_inv", "zero_point"): torch.ones(3, 2).int()}),
            r"zero points \[3, 2\] of I32, which do not go together",
        ),
    ],
)
def test_broken_scales_are_refused(
    change: Callable[[dict[str, Tensor], str], Any], words: str, quantised: Quantised
) -> None:
    folder, _ = quantised("deepseek")
    weights = load_file(folder / "model.safetensors")
    change(weights, "model.layers.1.self_attn.q_proj.weight_scale_inv")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load(folder)
