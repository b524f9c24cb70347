"""Where a model comes from: the settings, and what they lead to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdtune.checkpoint.adapters import SETTINGS, check_adapter, load_adapter, read_adapter
from kdtune.checkpoint.huggingface import check_files, load_model, read_config, select_layers
from kdtune.config import MISSING, setting
from kdtune.models import (
    Decoder,
    LoraConfig,
    ModelConfig,
    add_lora,
    check_quantization,
    from_hf_config,
    init_lora,
    prepare_qat,
    trained_shapes,
)


@dataclass
class CheckpointerConfig:
    """Where a model comes from."""

    checkpoint_dir: str = setting(MISSING, path=True)  # Hugging Face folder: config.json, *.safetensors, tokenizer
    adapter_dir: str | None = setting(None, path=True)  # LoRA adapter (PEFT's format) to merge into it; null: none

    @property
    def tokenizer_dir(self) -> str:
        """Where the tokenizer is: with the adapter if that has one, since it may have been trained with a template."""
        has_own = self.adapter_dir is not None and (Path(self.adapter_dir) / "tokenizer_config.json").is_file()
        return self.adapter_dir if self.adapter_dir is not None and has_own else self.checkpoint_dir

    def read_config(self) -> dict[str, Any]:
        """The `config.json` of the model as it will be loaded.

        Raises:
            FileNotFoundError, ValueError: as `read_config`, `from_hf_config` and `read_adapter`.
        """
        hf_config = read_config(self.checkpoint_dir)
        config = from_hf_config(hf_config)
        return (
            hf_config if self.adapter_dir is None else read_adapter(self.adapter_dir, config).merged_config(hf_config)
        )


@dataclass
class StartCheckpointerConfig(CheckpointerConfig):
    """Where a model that is going to be trained starts."""

    random_weights: bool = False  # start from fresh weights of the shape in config.json; other weights are not read
    keep_layers: list[int] | None = None  # start from these layers of it, in increasing order; null: all

    @property
    def is_in_a_folder(self) -> bool:
        """Whether the model is that of `checkpoint_dir` as it is, so that an adapter of it can be used elsewhere."""
        return self.keep_layers is None and self.adapter_dir is None

    def read_config(self) -> dict[str, Any]:
        """The `config.json` of the model as it will be loaded.

        Raises:
            FileNotFoundError, ValueError: as `read_config`, `from_hf_config`, `read_adapter` and `select_layers`.
        """
        return select_layers(super().read_config(), self.keep_layers)


def check_model(cfg: CheckpointerConfig) -> dict[str, Any]:
    """The `config.json` of a model as it will be loaded, once everything it is loaded from is known to be there.

    Raises:
        FileNotFoundError, ValueError: as `read_config`, `check_files` and `read_adapter`.
    """
    check_files(cfg.checkpoint_dir, from_hf_config(read_config(cfg.checkpoint_dir)))
    return cfg.read_config()


def check_start(
    cfg: StartCheckpointerConfig, resume_from: Path | None, lora: LoraConfig | None = None
) -> dict[str, Any]:
    """The `config.json` of the model that will be trained, once everything it starts from is known to be there.

    Args:
        cfg: where the first step starts.
        resume_from: a checkpoint of the run, from which it goes on instead.
        lora: the adapter that is trained. None: all weights are.

    Raises:
        FileNotFoundError, ValueError: as `read_config`, `select_layers`, `check_files`, `read_adapter` and
            `check_adapter`; or the checkpoint is of another model than `cfg`.
    """
    if cfg.random_weights and cfg.adapter_dir is not None:
        raise ValueError(
            "checkpointer.adapter_dir is a change of trained weights, and checkpointer.random_weights=true reads none. "
            "Leave one of them out."
        )
    config = cfg.read_config()
    if not cfg.random_weights and (resume_from is None or lora is not None):
        check_files(cfg.checkpoint_dir, from_hf_config(read_config(cfg.checkpoint_dir)))
    if lora is not None:
        if (folder := resume_from or lora.start_from) is not None:
            check_adapter(folder, from_hf_config(config), lora)
    elif resume_from is not None:
        if (resume_from / SETTINGS).is_file():
            raise ValueError(f"{resume_from} holds an adapter, since the run began with lora. Restore these settings.")
        saved = from_hf_config(read_config(resume_from))
        check_files(resume_from, saved)
        if saved != from_hf_config(config):
            raise ValueError(
                f"{resume_from} holds a model of another architecture than checkpointer.checkpoint_dir="
                f"{cfg.checkpoint_dir} with checkpointer.keep_layers={cfg.keep_layers}. A run goes on with the model "
                "that it began with: restore these settings, or begin another run in another output_dir."
            )
    return config


def check_lora(
    lora: LoraConfig,
    start: StartCheckpointerConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    merged_dtype: str | None,
) -> None:
    """Refuse settings of an adapter that exclude each other or others.

    Args:
        lora: the adapter that is trained.
        start: where its model comes from.
        config: the model's architecture.
        dtype: of the model's weights.
        device: where they are.
        merged_dtype: `save_dtype`, which is that of a whole model.

    Raises:
        ValueError: as `trained_shapes` and `check_quantization`; or says which settings, and what to leave out.
    """
    if start.random_weights:
        raise ValueError(
            "lora trains a small change of weights that stay as they are, and checkpointer.random_weights=true makes "
            "them random. Leave one of them out."
        )
    if not start.is_in_a_folder and not lora.save_merged:
        setting = "keep_layers" if start.keep_layers is not None else "adapter_dir"
        raise ValueError(
            f"checkpointer.{setting} makes a model that is in no folder, so nobody could use an adapter of it. Give "
            "lora.save_merged=true, which writes the whole model instead."
        )
    if not start.is_in_a_folder and lora.start_from is not None:
        raise ValueError(
            f"lora.start_from={lora.start_from} is the adapter of a model in a folder, and checkpointer.keep_layers or "
            "checkpointer.adapter_dir makes another model. Leave one of them out."
        )
    if merged_dtype is not None and not lora.save_merged:
        raise ValueError(
            f"save_dtype={merged_dtype} is about a whole model, and with lora only the adapter is written, in float32. "
            "Give save_dtype=null, or write the model as well: lora.save_merged=true."
        )
    trained_shapes(config, lora)
    if lora.base_quantization is not None:
        setting = "lora.base_quantization"
        check_quantization(
            lora.base_quantization, config, dtype=dtype, device=device, setting=setting, needs_gradient=True
        )


def load_start(
    cfg: Any,
    resume_from: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: Callable[[Decoder], None] | None = None,
) -> Decoder:
    """The model as it is trained: from where its first step starts, or from a checkpoint of its own run.

    Args:
        cfg: a recipe's settings: `checkpointer`, with an adapter `lora`, with weights that are rounded `qat`, and the
            `seed` of random weights and of a new adapter.
        resume_from: a checkpoint of the run. It is a whole model, and how the first one was made no longer matters; or
            with `lora` an adapter, and the model is that of `checkpointer`, which no step changes.
        dtype: of the weights in memory.
        device: where they are put.
        shard: as of `load_model`.

    Raises:
        FileNotFoundError, ValueError: as `load_model` and `load_adapter`.
    """

    start: StartCheckpointerConfig = cfg.checkpointer
    lora: LoraConfig | None = cfg.lora

    def prepare(model: Decoder) -> None:
        if lora is not None:
            add_lora(model, lora, seed=cfg.seed)
        if cfg.qat is not None:
            prepare_qat(model, cfg.qat)
        if shard is not None:
            shard(model)

    in_few_bits = lora is not None and lora.base_quantization is not None  # which each process quantises as a whole
    is_prepared_first = shard is not None and not in_few_bits
    settings: dict[str, Any] = {"dtype": dtype, "device": device, "shard": prepare if is_prepared_first else None}
    if resume_from is not None and lora is None:
        model = load_model(resume_from, **settings)
    else:
        model = load_model(
            start.checkpoint_dir,
            adapter_dir=start.adapter_dir,
            keep_layers=start.keep_layers,
            quantization=None if lora is None else lora.base_quantization,
            random_weights=start.random_weights,
            seed=cfg.seed,
            **settings,
        )
    if not is_prepared_first:
        prepare(model)
    elif lora is not None:
        init_lora(model, seed=cfg.seed)
    if lora is not None:
        load_adapter(model, resume_from or lora.start_from)
    return model
