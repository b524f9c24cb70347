"""Runs that round: what comes out is what was validated, for kdtune and for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import distil, finetune
from torch import Tensor

from kdtune import checkpoint, data, tokenizers
from kdtune.models import QATConfig, prepare_qat

SCHEMES = {
    "int4": ["qat.group_size=16"],
    "int8": ["qat.weights=int8"],
    "int4-int8": ["qat.group_size=16", "qat.activations=int8"],
    "int8-int8": ["qat.weights=int8", "qat.activations=int8"],
}
SHORT = ["max_steps=3", "lr_scheduler.num_warmup_steps=1"]


def batch_of(tiny: Path) -> data.Batch:
    cfg = data.DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    examples = data.load(cfg, tokenizers.load(tiny / "student"), 64)
    return data.collate([examples[i] for i in range(3)])


def qat_of(settings: list[str]) -> QATConfig:
    found = dict(setting.removeprefix("qat.").split("=") for setting in settings)
    return QATConfig(**found | ({"group_size": int(found["group_size"])} if "group_size" in found else {}))


def logits(folder: Path, batch: data.Batch, dtype: torch.dtype, qat: QATConfig | None = None) -> Tensor:
    model = checkpoint.load_model(folder, dtype=dtype, device="cpu")
    if qat is not None:
        prepare_qat(model, qat)
    with torch.no_grad():
        return model(batch.tokens, batch.positions)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_comes_out_is_what_was_trained(scheme: str, dtype: str, tiny: Path, tmp_path: Path) -> None:
    """The checkpoint of the last step has the weights before rounding."""
    run = distil(tiny, tmp_path / "run", *SCHEMES[scheme], *SHORT, f"dtype={dtype}", "save_every_n_steps=3")
    before, batch = run / "checkpoints/step_00000003", batch_of(tiny)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    qat = qat_of(SCHEMES[scheme])

    trained = logits(before, batch, torch_dtype, qat)
    found = logits(run / "model", batch, torch_dtype)
    if qat.activations is None:
        assert torch.equal(found, trained)
    else:
        assert torch.equal(logits(run / "model", batch, torch_dtype), found)
        assert (found - trained).float().norm() < 0.05 * trained.float().norm()
    assert not torch.equal(found, logits(before, batch, torch_dtype))

    bits = {name: 8 * tensor.nbytes for name, tensor in load_file(run / "model/model.safetensors").items()}
    name = "model.layers.0.mlp.gate_proj.weight"
    size = bits.get(name, bits.get(f"{name}_packed"))
    assert size == (qat.bits if qat.activations is None else 8) * 32 * 48
    config = checkpoint.read_config(run / "model")["quantization_config"]
    assert config["format"] == ("pack-quantized" if qat.activations is None else "int-quantized")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_the_same(scheme: str, tiny: Path, tmp_path: Path) -> None:
    """With compressed-tensors, which rounds activations as well."""
    pytest.importorskip("compressed_tensors")
    import transformers

    run = finetune(tiny, tmp_path / "run", *SCHEMES[scheme], *SHORT, "save_every_n_steps=3")
    batch, qat = batch_of(tiny), qat_of(SCHEMES[scheme])
    trained = logits(run / "checkpoints/step_00000003", batch, torch.float32, qat)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(batch.tokens, position_ids=batch.positions).logits
    assert torch.allclose(found, trained, atol=1e-5)


def test_validation_is_of_the_rounded_model(tiny: Path, trained: Path, tmp_path: Path) -> None:
    """Before the first step it is that of rounding a trained model; training takes back some of what rounding cost."""
    start = [f"checkpointer.checkpoint_dir={trained}", "optimizer.lr=0.002", *tiny_runs.validated_on(tiny)]
    runs = (finetune(tiny, tmp_path / name, *start, *SCHEMES.get(name, [])) for name in ("full", "int4"))
    full, rounded = ([line["val_loss"] for line in tiny_runs.lines(run) if "val_loss" in line] for run in runs)
    assert rounded[0] > 1.01 * full[0]
    assert rounded[-1] < rounded[0]


def test_what_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, words in (
        (["qat.weights=int4"], "multiple of 32"),
        (["qat.weights=int8", "lora.rank=4", "checkpointer.keep_layers=[0]"], "with lora those stay as they are"),
        (["qat.weights=int8", "save_dtype=bf16"], "save_dtype=bf16 would round the scales"),
    ):
        with pytest.raises(SystemExit):
            distil(tiny, tmp_path / "run", *settings)
        assert words in capsys.readouterr().err


def test_says_what_is_rounded(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    run = distil(tiny, tmp_path / "run", *SCHEMES["int4-int8"], *SHORT)
    assert "\nqat       int4 weights, a scale per 16, int8 activations\n" in capsys.readouterr().out
    assert json.loads((run / "model/config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
