"""Quantised checkpoints: which are read, which refused, and what quantisation-aware training writes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtune.checkpoint.weights import CODES, DTYPES, PACKED, StoredTensor
from kdtune.models import QATConfig, convert_qat

QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # of config.json; the second is older
# What a weight's numbers are multiplied by. Both are that, the first one's name notwithstanding.
_SCALES = ("weight_scale_inv", "weight_scale")
# For kernels that round activations, keys and values as well. Here these stay as they come.
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[kvq])_(global_)?(scale|zero_point)$")
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
_PACKED = "weight_packed"
_ZERO_POINT = "weight_zero_point"
_TORCHAO = re.compile(r"(?<=\.)_weight_(qdata|scale|zero_point)$")
_NAMES = {"qdata": "weight", "scale": "weight_scale", "zero_point": _ZERO_POINT}
# What belongs to a quantised weight, in formats that are not read as well.
PART = re.compile(r"\._?weight[_.]\w+$")


def check_format(folder: Path, hf_config: Mapping[str, Any]) -> tuple[str | None, list[tuple[int, int]]]:
    """Refuse a checkpoint in a quantised format that kdtune does not read.

    Args:
        folder: the checkpoint, to name it.
        hf_config: its `config.json`.

    Returns:
        The method that it names, if any; rows and columns of the blocks that share a scale, for each kind of them.

    Raises:
        ValueError: says what the format is, and what to take instead.
    """
    found: Mapping[str, Any] = next((hf_config[key] for key in QUANTIZATION_KEYS if hf_config.get(key)), {})
    method = found.get("quant_method", "compressed-tensors" if "config_groups" in found else None)
    blocks = [found.get("weight_block_size")]
    obstacle = None
    if method == "compressed-tensors":
        groups = list(found.get("config_groups", {}).values())
        obstacle = _compressed_tensors(found, groups)
        blocks = [_block_size(group.get("weights") or {}) for group in groups]
    elif method == "modelopt":
        algorithm = str(found.get("quant_algo")).upper()
        obstacle = None if algorithm in _MODELOPT else f"quant_algo {algorithm}"
        blocks = [(128, 128)] if algorithm == "FP8_PB_WO" else []
    elif method not in (None, "fp8", "fbgemm_fp8", "torchao"):
        obstacle = ""
    if obstacle is not None:
        raise ValueError(refusal(folder, f"{method}{', ' * bool(obstacle)}{obstacle}"))
    return method, [(int(rows), int(columns)) for rows, columns in filter(None, blocks)]


def refusal(folder: Path, what: str) -> str:
    """The words for a quantised format that kdtune does not read."""
    return (
        f"{folder} is quantised ({what}), and kdtune reads weights that are fp8, or integers of 4 or 8 bits, with "
        "scales: quant_method fp8, fbgemm_fp8, modelopt with FP8, compressed-tensors that are float-, int- or "
        "pack-quantized, torchao's int8 and fp8. Use the checkpoint that it was made from; teacher.quantization stores "
        "a teacher in few bits while it is read."
    )


def _compressed_tensors(found: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str | None:
    """What kdtune does not read of it, in words."""
    formats = {group.get("format") or found.get("format") for group in groups} or {found.get("format")}
    if unknown := [str(name) for name in formats if name not in _COMPRESSED]:
        return f"format {unknown[0]}"
    if (found.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return f"sparsity {found['sparsity_config']['format']}"
    if found.get("transform_config"):
        return "transform_config"
    for weights in filter(None, (group.get("weights") for group in groups)):
        if weights.get("num_bits") not in (4, 8):
            return f"{weights.get('num_bits')} bits"
        if weights.get("actorder") not in (None, False, "static", "weight"):
            return f"actorder {weights['actorder']}"
    return None


def _block_size(weights: Mapping[str, Any]) -> Any:
    """Rows and columns that share a scale, if that is neither a row nor all of a weight."""
    sizes = {"block": weights.get("block_structure"), "group": (1, weights.get("group_size"))}
    return sizes.get(str(weights.get("strategy")))


def with_scales(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Sequence[tuple[int, int]],
) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint, scales beside the weights that they belong to, without those of activations.

    Args:
        folder: the checkpoint, to name it.
        stored: where each tensor lies.
        shapes: of the model's parameters, by name.
        blocks: as from `check_format`.

    Raises:
        ValueError: a quantised weight has no scale, or one of a shape that says nothing.
    """
    named = {_TORCHAO.sub(lambda match: _NAMES[match[1]], name): tensor for name, tensor in stored.items()}
    for name in [name for name in named if name.endswith(_PACKED)]:
        owner = name.removesuffix(_PACKED)
        named.pop(f"{owner}weight_shape", None)
        named[f"{owner}weight"] = _unpacked(named.pop(name), shapes.get(f"{owner}weight", ()))
    for name in [name for name, tensor in named.items() if tensor.dtype in (*CODES, *PACKED)]:
        if not name.endswith(".weight"):
            continue
        owner, weight = name.removesuffix("weight"), named[name]
        scale = next((named.pop(owner + suffix) for suffix in _SCALES if owner + suffix in named), None)
        if scale is None:
            raise ValueError(
                f"{folder}: {name} is stored as {weight.dtype} without {owner}{_SCALES[1]}, so that its numbers mean "
                "nothing. Was it quantised in a format of its own? Use the checkpoint that it was made from."
            )
        zero_point = named.pop(owner + _ZERO_POINT, None)
        if zero_point is not None:
            zero_point = _placed(folder, name, weight, scale, zero_point)
        block = _block(folder, name, weight, scale, blocks)
        named[name] = replace(weight, scale=scale, zero_point=zero_point, block=block)
    return {name: tensor for name, tensor in named.items() if not _OF_ACTIVATIONS.search(name)}


def _unpacked(words: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """A weight [n, d] whose integers lie in 32-bit words, [n, d * bits / 32]."""
    bits = 32 * words.shape[-1] // shape[-1] if shape else 0
    dtype = next((name for name, width in PACKED.items() if width == bits), words.dtype)
    return replace(words, dtype=dtype, shape=(words.shape[0], 32 * words.shape[1] // max(1, bits)))


def _placed(
    folder: Path, name: str, weight: StoredTensor, scale: StoredTensor, zero_point: StoredTensor
) -> StoredTensor:
    """The zero points of a weight, one for each scale; a packed weight's are packed down the rows, which are padded."""
    if weight.dtype in PACKED and zero_point.dtype == "I32":
        per_word = 32 // PACKED[weight.dtype]
        if zero_point.shape == (-(-scale.shape[0] // per_word), *scale.shape[1:]):
            return replace(zero_point, dtype=weight.dtype, shape=(per_word * zero_point.shape[0], *scale.shape[1:]))
    elif zero_point.dtype in DTYPES | CODES and zero_point.shape == scale.shape:
        return zero_point
    raise ValueError(
        f"{folder}: {name} has scales {list(scale.shape)} and zero points {list(zero_point.shape)} of "
        f"{zero_point.dtype}, which do not go together. Is config.json that of these weights?"
    )


def _block(
    folder: Path, name: str, weight: StoredTensor, scale: StoredTensor, blocks: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    n, d = weight.shape
    if scale.dtype in DTYPES:
        if scale.shape in ((), (1,), (1, 1)):
            return n, d
        if scale.shape in ((n,), (n, 1)):
            return 1, d
        for rows, columns in blocks:
            if scale.shape == (-(-n // rows), -(-d // columns)):
                return rows, columns
    sizes = " or ".join(f"{rows} x {columns}" for rows, columns in blocks)
    wanted = f"of blocks of {sizes}" if blocks else "one for all, or one for each row"
    raise ValueError(
        f"{folder}: {name} is {n} x {d}, and its scales are {list(scale.shape)} of {scale.dtype}, which is not "
        f"{wanted}. Is config.json that of these weights?"
    )


def compressed_config(cfg: QATConfig) -> dict[str, Any]:
    """`quantization_config` of what `compressed_parts` gives: the format compressed-tensors, which vLLM and
    transformers read."""
    weights = {
        "num_bits": cfg.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if cfg.weights == "int8" else "group",
        "group_size": None if cfg.weights == "int8" else cfg.columns(0),
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    layers = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations if cfg.activations else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized" if _is_packed(cfg) else "int-quantized",
        "config_groups": {"group_0": layers},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def compressed_parts(name: str, weight: Tensor, cfg: QATConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand in a file for a weight [n, d] as training has rounded it; scales in `dtype`.

    They are on the host; on `meta` if the weight is there.
    """
    codes, scale = convert_qat(weight, cfg)
    place = "meta" if weight.is_meta else "cpu"
    owner = name.removesuffix("weight")
    parts = {f"{owner}weight_scale": scale.to(place, dtype)}
    if not _is_packed(cfg):
        return parts | {name: codes.to(place)}
    unsigned = (codes.to(torch.int16) + 2 ** (cfg.bits - 1)).to(place, torch.uint8)
    if cfg.bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    shape = torch.tensor(weight.shape)
    return parts | {f"{owner}{_PACKED}": unsigned.contiguous().view(torch.int32), f"{owner}weight_shape": shape}


def _is_packed(cfg: QATConfig) -> bool:
    # As compressed-tensors has it: integers that meet integers are not, even where 4 bits would do.
    return cfg.activations is None
