"""Bytes on the disk, and in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kdtune import memory, models, optim
from kdtune.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=512,
    windows=(None,) * 3,
)


def test_disk() -> None:
    def disk(**settings: Any) -> int:
        defaults = {"dtype": "bf16", "save_dtype": None, "optimizer": nearest, "save_every_n_steps": 1, "lora": None}
        return memory.disk(SimpleNamespace(**defaults | settings), CONFIG)

    bf16 = 2 * models.num_parameters(CONFIG)
    nearest = optim.OptimizerConfig(precision="nearest")
    assert disk(save_dtype="fp32", save_every_n_steps=0) == 2 * bf16
    assert disk() == bf16 + 2 * (bf16 + 2 * bf16)
    assert disk(optimizer=optim.OptimizerConfig()) == bf16 + 2 * (bf16 + 5 * bf16)

    lora = models.LoraConfig(rank=4, target_modules=["q_proj"])
    adapter = 4 * CONFIG.num_layers * 4 * (128 + 4 * 32)
    assert disk(lora=lora) == adapter + 2 * 3 * adapter, "the adapter alone is saved, and its moments"
    lora.save_merged = True
    assert disk(lora=lora, save_every_n_steps=0) == adapter + bf16


def test_it_reads_well() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1610612736: "1.5 GiB", 5 * 2**40: "5120.0 GiB"}
    assert {count: memory.format_bytes(count) for count in sizes} == sizes
