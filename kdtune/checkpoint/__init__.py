"""Checkpoints: Hugging Face folders in and out, where a model starts, and the state of a run."""

from kdtune.checkpoint.huggingface import (
    check_files,
    load_model,
    read_companions,
    read_config,
    save_model,
    select_layers,
)
from kdtune.checkpoint.start import CheckpointerConfig, StartCheckpointerConfig, check_start, load_start
from kdtune.checkpoint.state import Run, check_resume, latest, prepare_output_dir

__all__ = [
    "CheckpointerConfig",
    "Run",
    "StartCheckpointerConfig",
    "check_files",
    "check_resume",
    "check_start",
    "latest",
    "load_model",
    "load_start",
    "prepare_output_dir",
    "read_companions",
    "read_config",
    "save_model",
    "select_layers",
]
