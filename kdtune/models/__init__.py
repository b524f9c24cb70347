"""One decoder in plain PyTorch; model families are data (`families.py`), parameter names are the Hugging Face ones."""

from kdtune.models.cache import KVCache
from kdtune.models.checkpointing import CheckpointingMode, check_checkpointing
from kdtune.models.config import ModelConfig, RopeConfig
from kdtune.models.decoder import Decoder, enable_activation_checkpointing, num_parameters, parameter_shapes
from kdtune.models.families import from_hf_config

__all__ = [
    "CheckpointingMode",
    "Decoder",
    "KVCache",
    "ModelConfig",
    "RopeConfig",
    "check_checkpointing",
    "enable_activation_checkpointing",
    "from_hf_config",
    "num_parameters",
    "parameter_shapes",
]
