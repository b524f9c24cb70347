"""The embedded teacher and the README's first command."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtune import checkpoint
from kdtune.cli.main import main
from kdtune.config import ASSETS

QUICKSTART = ASSETS / "quickstart"
SHORT = ["max_steps=3", "dataset.split=[:12]", "dataset_val.split=[:4]", "sample_max_new_tokens=4"]


def metrics_of(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_assets_are_small():
    assert sum(path.stat().st_size for path in QUICKSTART.rglob("*") if path.is_file()) < 8 * 10**6


def test_the_teacher_is_what_transformers_reads():
    folder = QUICKSTART / "teacher"
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = checkpoint.load_model(folder, dtype=torch.float32, device="cpu")
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("Question: Tom has 3 apples")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), oracle(tokens).logits, atol=1e-4, rtol=1e-5)


def test_the_teacher_is_as_good_as_its_card_says(tmp_path, capsys):
    """On the first validation rows; the card gives the loss on all 200."""
    main(["run", "knowledge_distillation", "--config", "quickstart", *SHORT, f"output_dir={tmp_path / 'run'}"])
    (first, *_) = metrics_of(tmp_path / "run")
    claimed = float(re.search(r"validation \| ([\d.]+) nats", (QUICKSTART / "README.md").read_text())[1])
    assert first["val_teacher_ce_loss"] < claimed + 0.3 < math.log(2048) / 2
    printed = capsys.readouterr().out
    assert "WARNING" not in printed
    for shown in ("student before", "student after", "teacher  ", "top-1 agreement", "prompt:", "Try it:"):
        assert shown in printed
    command = shlex.split(next(line for line in printed.splitlines() if line.strip().startswith("kdtune run generate")))
    main([*command[1:], "max_new_tokens=4"])
    assert "tokens/s" in capsys.readouterr().out


def test_the_teacher_can_be_trained_again(tmp_path):
    """The first steps of its config run; all of them take most of an hour."""
    settings = [*SHORT, "dataset.split=[:4]", "batch_size=1", f"output_dir={tmp_path / 'run'}"]
    main(["run", "finetune", "--config", "quickstart", *settings])
    losses = [line["loss"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2048), abs=0.3)  # random weights know nothing
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved == json.loads((QUICKSTART / "teacher" / "config.json").read_text())


@pytest.mark.slow
def test_the_readme_command_distils(tmp_path):
    command = ["-m", "kdtune", "run", "knowledge_distillation", "--config", "quickstart"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, timeout=900)
    lines = [line for line in metrics_of(tmp_path / "runs" / "quickstart") if "val_ce_loss" in line]
    before, during, after = lines[0], lines[1:-1], lines[-1]
    assert during
    assert after["val_ce_loss"] < before["val_ce_loss"] - 0.3
    assert after["val_kd_loss"] < before["val_kd_loss"] / 2


@pytest.mark.slow
def test_distilling_beats_the_labels_alone(tmp_path):
    """What docs/quickstart.md says, for one seed: same student, rows, order and steps."""
    after = {}
    for kd_ratio in (0, 1):
        output_dir = tmp_path / str(kd_ratio)
        settings = [f"kd_ratio={kd_ratio}", f"output_dir={output_dir}", "sample_prompts=[]", "seed=7"]
        main(["run", "knowledge_distillation", "--config", "quickstart", *settings])
        after[kd_ratio] = metrics_of(output_dir)[-1]
    assert after[1]["val_ce_loss"] < after[0]["val_ce_loss"] - 0.08
    assert after[1]["val_agreement"] > after[0]["val_agreement"] + 0.03
