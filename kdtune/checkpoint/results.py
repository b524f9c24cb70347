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
from kdtune.checkpoint.start import StartCheckpointerConfig
from kdtune.checkpoint.state import Run
from kdtune.distributed import Ranks
from kdtune.models import Decoder, LoraConfig, QATConfig


@dataclass(frozen=True)
class ModelWriter:
    """Writes a model that is trained, or with `lora` its adapter.

    Attributes:
        model: what is trained.
        start: where it came from.
        lora: its adapter; None: all weights are trained.
        qat: how training rounds its weights; the result consists of the rounded ones. None: it does not.
        config: its `config.json`, as from `check_start`.
        companions: other files of its folder, by name, as from `read_companions`.
        master: the float32 weight behind a bf16 one, as `AdamW.master`, which is written if `dtype` can hold it.
        ranks: the processes that hold the model together, and write it together.
    """

    model: Decoder
    start: StartCheckpointerConfig
    lora: LoraConfig | None
    qat: QATConfig | None
    config: Mapping[str, Any]
    companions: Mapping[str, bytes]
    master: Callable[[Tensor], Tensor]
    ranks: Ranks

    def write(self, folder: Path) -> None:
        """What training can go on from."""
        if self.lora is None:
            self._save_model(folder)
        else:
            base = self.start.checkpoint_dir
            save_adapter(self.model, folder, self.lora, base=base, companions=self.companions)

    def finish(self, run: Run, dtype: torch.dtype) -> str:
        """Write `adapter` or `model`, or both, into the folder of the run.

        Args:
            run: at its last step.
            dtype: of the weights in `model`.

        Returns:
            The settings by which `generate` finds the result.
        """
        source = ""
        if self.lora is not None and self.start.is_in_a_folder:
            adapter = run.finish(self.write, "adapter")
            source = f"{shlex.quote(self.start.checkpoint_dir)} checkpointer.adapter_dir={shlex.quote(str(adapter))}"
        if self.lora is None or self.lora.save_merged:
            write_model = functools.partial(self._save_model, dtype=dtype, qat=self.qat, master=self.master)
            source = shlex.quote(str(run.finish(write_model)))
        return f"checkpointer.checkpoint_dir={source}"

    def _save_model(self, folder: Path, **settings: Any) -> None:
        save_model(
            self.model,
            folder,
            config=self.config,
            companions=self.companions,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            **settings,
        )
