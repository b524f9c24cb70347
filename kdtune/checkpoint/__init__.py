"""Checkpoints: Hugging Face folders in and out, where a model starts, and the state of a run."""

from kdtune.checkpoint.adapters import load_adapter, read_adapter, save_adapter
from kdtune.checkpoint.huggingface import (
    check_files,
    load_model,
    read_companions,
    read_config,
    save_model,
    select_layers,
)
from kdtune.checkpoint.results import ModelWriter
from kdtune.checkpoint.start import (
    CheckpointerConfig,
    StartCheckpointerConfig,
    check_lora,
    check_model,
    check_start,
    load_start,
)
from kdtune.checkpoint.state import (
    Run,
    begin,
    beside,
    check_resume,
    is_started_again,
    latest,
    prepare_output_dir,
    record,
    write_aside,
)

__all__ = [
    "CheckpointerConfig",
    "ModelWriter",
    "Run",
    "StartCheckpointerConfig",
    "begin",
    "beside",
    "check_files",
    "check_lora",
    "check_model",
    "check_resume",
    "check_start",
    "is_started_again",
    "latest",
    "load_adapter",
    "load_model",
    "load_start",
    "prepare_output_dir",
    "read_adapter",
    "read_companions",
    "read_config",
    "record",
    "save_adapter",
    "save_model",
    "select_layers",
    "write_aside",
]
