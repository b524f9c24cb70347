"""What a run writes of the model that it trains: all of it, or an adapter."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtune.checkpoint.adapters import save_adapter
from kdtune.checkpoint.huggingface import save_model
from kdtune.checkpoint.state import Run
from kdtune.distributed import Ranks, trained_weights
from kdtune.models import Decoder


@dataclass(frozen=True)
class ModelWriter:
    """Writes a model that is trained, or with `lora` its adapter.

    Attributes:
        model: what is trained.
        cfg: the recipe's settings: with `lora` an adapter is written, with `qat` the weights as training rounds them.
        config: its `config.json`, as from `check_start`.
        companions: other files of its folder, by name, as from `read_companions`.
        master: the float32 weight behind a bf16 one, as `AdamW.master`, which is written if `dtype` can hold it.
        ranks: the processes that hold the model together, and write it together.
    """

    model: Decoder
    cfg: Any
    config: Mapping[str, Any]
    companions: Mapping[str, bytes]
    master: Callable[[Tensor], Tensor]
    ranks: Ranks

    def trained(self) -> dict[str, Tensor]:
        """All that steps change, by name."""
        return trained_weights(self.model)

    def write(self, folder: Path, trained: Mapping[str, Tensor] | None = None, ranks: Ranks | None = None) -> None:
        """Write what training can go on from.

        Args:
            folder: new or empty.
            trained: as `trained` gave it, or a copy. None: as it is now.
            ranks: among which it lies. None: those of training.
        """
        if self.cfg.lora is None:
            self._save_model(folder, trained=trained, ranks=ranks or self.ranks)
        else:
            save_adapter(
                self.model,
                folder,
                self.cfg.lora,
                base=self.cfg.checkpointer.checkpoint_dir,
                companions=self.companions,
                trained=trained,
                ranks=ranks or self.ranks,
            )

    def finish(self, run: Run, dtype: torch.dtype) -> str:
        """Write `adapter` or `model`, or both, into the folder of the run.

        Args:
            run: at its last step.
            dtype: of the weights in `model`.

        Returns:
            The settings by which `generate` finds the result.
        """
        source = ""
        if self.cfg.lora is not None and self.cfg.checkpointer.is_in_a_folder:
            adapter = run.finish(self.write, "adapter")
            base = shlex.quote(self.cfg.checkpointer.checkpoint_dir)
            source = f"{base} checkpointer.adapter_dir={shlex.quote(str(adapter))}"
        if self.cfg.lora is None or self.cfg.lora.save_merged:
            settings = {"dtype": dtype, "qat": self.cfg.qat, "master": self.master, "ranks": self.ranks}
            write_model = functools.partial(self._save_model, **settings)
            source = shlex.quote(str(run.finish(write_model)))
        return f"checkpointer.checkpoint_dir={source}"

    def commands(self, found_by: str) -> str:
        """That have what `finish` wrote continue a prompt, and show the run as a page."""
        chat = "chat=true " * self.cfg.dataset.has_chats
        prompt = shlex.quote((self.cfg.sample_prompts or ["Hello"])[0])
        generate = (
            f"kdtune run generate {found_by} device={self.cfg.device} dtype={self.cfg.dtype} {chat}prompt={prompt}"
        )
        return f"  {generate}\nLook at the run:\n  kdtune report {shlex.quote(self.cfg.output_dir)}"

    def _save_model(self, folder: Path, **settings: Any) -> None:
        save_model(self.model, folder, config=self.config, companions=self.companions, **settings)
