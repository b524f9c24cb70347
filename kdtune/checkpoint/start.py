"""Where a model comes from: the settings, and what they lead to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdtune.checkpoint.huggingface import check_files, load_model, read_config, select_layers
from kdtune.config import MISSING, setting
from kdtune.models import Decoder, from_hf_config


@dataclass
class CheckpointerConfig:
    """Where a model comes from."""

    checkpoint_dir: str = setting(MISSING, path=True)  # Hugging Face folder: config.json, *.safetensors, tokenizer


@dataclass
class StartCheckpointerConfig(CheckpointerConfig):
    """Where a model that is going to be trained starts."""

    random_weights: bool = False  # start from fresh weights of the shape in config.json; other weights are not read
    keep_layers: list[int] | None = None  # start from these layers of it, in increasing order; null: all


def check_start(cfg: StartCheckpointerConfig, resume_from: Path | None) -> dict[str, Any]:
    """The `config.json` of the model that will be trained, once everything it starts from is known to be there.

    Args:
        cfg: where the first step starts.
        resume_from: a checkpoint of the run, from which it goes on instead.

    Raises:
        FileNotFoundError, ValueError: as `read_config`, `select_layers` and `check_files`; or the checkpoint is of
            another architecture than `cfg`.
    """
    hf_config = read_config(cfg.checkpoint_dir)
    whole = from_hf_config(hf_config)
    config = select_layers(hf_config, cfg.keep_layers)
    if resume_from is None and not cfg.random_weights:
        check_files(cfg.checkpoint_dir, whole)
    if resume_from is not None:
        saved = from_hf_config(read_config(resume_from))
        check_files(resume_from, saved)
        if saved != from_hf_config(config):
            raise ValueError(
                f"{resume_from} holds a model of another architecture than checkpointer.checkpoint_dir="
                f"{cfg.checkpoint_dir} with checkpointer.keep_layers={cfg.keep_layers}. A run goes on with the model "
                "that it began with: restore these settings, or begin another run in another output_dir."
            )
    return config


def load_start(
    cfg: StartCheckpointerConfig, resume_from: Path | None, *, dtype: torch.dtype, device: torch.device, seed: int
) -> Decoder:
    """The model to train: from `cfg`, or from a checkpoint of its own run.

    Args:
        cfg: where the first step started.
        resume_from: a checkpoint of the run, which is a whole model: how the first one was made no longer matters.
        dtype: of the weights in memory.
        device: where they are put.
        seed: of `random_weights`.
    """
    if resume_from is not None:
        return load_model(resume_from, dtype=dtype, device=device)
    return load_model(
        cfg.checkpoint_dir,
        dtype=dtype,
        device=device,
        keep_layers=cfg.keep_layers,
        random_weights=cfg.random_weights,
        seed=seed,
    )
