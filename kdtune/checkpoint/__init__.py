"""Checkpoints: Hugging Face folders in and out (`huggingface.py`), and the state of a run (`state.py`)."""

from dataclasses import dataclass

from kdtune.checkpoint.huggingface import (
    check_files,
    copy_companions,
    load_model,
    read_config,
    save_model,
    select_layers,
)
from kdtune.checkpoint.state import Run, latest, prepare_output_dir
from kdtune.config import MISSING

__all__ = [
    "CheckpointerConfig",
    "Run",
    "TeacherCheckpointerConfig",
    "check_files",
    "copy_companions",
    "latest",
    "load_model",
    "prepare_output_dir",
    "read_config",
    "save_model",
    "select_layers",
]


@dataclass
class CheckpointerConfig:
    """Where a model comes from."""

    checkpoint_dir: str = MISSING  # Hugging Face folder: config.json, *.safetensors, tokenizer
    random_weights: bool = False  # start from fresh weights of the shape in config.json; other weights are not read
    keep_layers: list[int] | None = None  # start from these layers of it, in increasing order; null: all


@dataclass
class TeacherCheckpointerConfig:
    """Where the teacher comes from."""

    checkpoint_dir: str = MISSING  # Hugging Face folder: config.json, *.safetensors, tokenizer
