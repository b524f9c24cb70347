"""One decoder in plain PyTorch; model families are data (`families.py`), parameter names are the Hugging Face ones."""

from kdtune.models.cache import KVCache
from kdtune.models.checkpointing import CheckpointingMode, check_checkpointing
from kdtune.models.config import ModelConfig, RopeConfig
from kdtune.models.decoder import (
    Decoder,
    compile_layers,
    enable_activation_checkpointing,
    head_names,
    module_names,
    num_parameters,
    parameter_shapes,
)
from kdtune.models.families import from_hf_config
from kdtune.models.lora import LoraConfig, add_lora, init_lora, merge, merged, trained_parameters, trained_shapes
from kdtune.models.qat import QATConfig, check_qat, convert_qat, prepare_qat
from kdtune.models.quantization import (
    Quantization,
    QuantizedLinear,
    check_quantization,
    dequantize,
    is_quantized,
    num_bytes,
    quantize,
    quantize_linear,
    quantized_shapes,
    stored_fp8,
)
from kdtune.models.streaming import stream_layers

__all__ = [
    "CheckpointingMode",
    "Decoder",
    "KVCache",
    "LoraConfig",
    "ModelConfig",
    "QATConfig",
    "Quantization",
    "QuantizedLinear",
    "RopeConfig",
    "add_lora",
    "check_checkpointing",
    "check_qat",
    "check_quantization",
    "compile_layers",
    "convert_qat",
    "dequantize",
    "enable_activation_checkpointing",
    "from_hf_config",
    "head_names",
    "init_lora",
    "is_quantized",
    "merge",
    "merged",
    "module_names",
    "num_bytes",
    "num_parameters",
    "parameter_shapes",
    "prepare_qat",
    "quantize",
    "quantize_linear",
    "quantized_shapes",
    "stored_fp8",
    "stream_layers",
    "trained_parameters",
    "trained_shapes",
]
