"""`prune`: the folder that it writes, by which scores, and what it refuses before it loads weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import save_file
from tiny_runs import TEACHER_ASSETS

from kdtune import checkpoint, data, tokenizers
from kdtune.cli.main import main
from kdtune.data import DatasetConfig
from kdtune.models import Decoder

Prune = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with four heads."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_runs.write_model(tmp_path_factory.mktemp("whole"), seed=3, initializer_range=0.2, **sizes)


@pytest.fixture
def prune(whole: Path, tiny: Path, tmp_path: Path) -> Prune:
    """`prune("depth.num_layers=2")`: the folder of the run, which read all ten rows."""

    def run(*overrides: str) -> Path:
        settings = [
            f"checkpointer.checkpoint_dir={whole}",
            f"output_dir={tmp_path / 'run'}",
            f"dataset.source={tiny / 'rows.jsonl'}",
            "dataset.format=completion",
            "tokenizer.max_seq_len=64",
            "num_batches=2",
            "batch_size=5",
            "device=cpu",
            "dtype=fp32",
        ]
        main(["run", "prune", *settings, *overrides])
        return tmp_path / "run"

    return run


def load(folder: Path, **settings: Any) -> Decoder:
    return checkpoint.load_model(folder, dtype=torch.float32, device="cpu", **settings).eval()


@torch.no_grad()
def cross_entropy(model: Decoder, tiny: Path, whole: Path) -> float:
    """Mean over all labelled tokens of the rows, one by one."""
    cfg = DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    examples = data.load(cfg, tokenizers.load(whole), 64)
    losses = [torch.nn.functional.cross_entropy(model(x[None])[0], y, reduction="none") for x, y in examples]
    return float(torch.cat(losses).sum() / examples.num_labels)


def scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "importance.json").read_text())


def test_layers_chosen_by_hand(prune: Prune, whole: Path) -> None:
    run = prune("depth.keep_layers=[0,2,3]")
    expected = load(whole, keep_layers=[0, 2, 3])
    found = load(run / "model")
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), atol=0, rtol=0)
    assert {path.name for path in (run / "model").iterdir()} == {path.name for path in whole.iterdir()}
    for name in checkpoint.read_companions(whole):
        assert (run / "model" / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "recipe.py", "versions.json", "importance.json", "model")
    }


@pytest.mark.parametrize("block", [1, 2])
def test_perplexity_is_the_rise_of_the_cross_entropy(
    block: int, prune: Prune, whole: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prune("depth.num_layers=2", "depth.importance=perplexity", f"depth.contiguous={block > 1}")
    before = cross_entropy(load(whole), tiny, whole)
    layers = range(4)
    without = [
        cross_entropy(load(whole, keep_layers=[i for i in layers if not first <= i < first + block]), tiny, whole)
        for first in range(5 - block)
    ]
    found = scores(run)["layers"]
    assert (found["importance"], found["block_size"]) == ("perplexity", block)
    assert found["scores"] == pytest.approx([ce - before for ce in without], abs=1e-4)
    if block > 1:
        first = without.index(min(without))
        expected = [i for i in layers if not first <= i < first + block]
    else:
        expected = sorted(sorted(layers, key=lambda i: without[i])[2:])
    assert found["kept"] == expected
    assert load(run / "model").config == load(whole, keep_layers=expected).config
    after = cross_entropy(load(run / "model"), tiny, whole)
    assert scores(run)["ce_before"] == pytest.approx(before, abs=1e-4)
    assert scores(run)["ce_after"] == pytest.approx(after, abs=1e-4)
    out = capsys.readouterr().out
    assert f"cross-entropy of the text: {before:.3f} before, {after:.3f} after" in out
    title, *rows = out[out.index("layer ") :].splitlines()[:5]
    assert re.fullmatch(rf"layer +importance: perplexity{' of the 2 from it' * (block > 1)} *", title)
    assert len({len(line) for line in (title, *rows)}) == 1


def test_everything_at_once_is_distilled(
    prune: Prune, whole: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prune(
        *("depth.num_layers=3", "width.hidden_size=24", "width.intermediate_size=20", "width.num_kv_heads=1"),
        *("width.aggregation=mean", "save_dtype=bf16"),
    )
    config = checkpoint.read_config(run / "model")
    assert {key: value for key, value in config.items() if value != checkpoint.read_config(whole).get(key)} == {
        **{"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"num_hidden_layers": 3, "dtype": "bfloat16"},
    }
    found = scores(run)
    sizes = {"layers": (4,), "heads": (4, 4), "mlp": (4, 48), "hidden": (32,)}
    stay = {"layers": (3,), "heads": (4, 2), "mlp": (4, 20), "hidden": (24,)}
    for name in sizes:
        assert torch.tensor(found[name]["scores"]).shape == sizes[name]
        assert torch.tensor(found[name]["kept"]).shape == stay[name]
    out = capsys.readouterr().out
    assert out.count(" stays ") == 3
    assert out.count(" goes") == 1
    settings = [f"checkpointer.checkpoint_dir={run / 'model'}", f"teacher_checkpointer.checkpoint_dir={whole}"]
    student = tiny_runs.distil(tiny, tmp_path / "student", *settings, "max_steps=2")
    assert load(student / "model").config == load(run / "model").config


def test_which_rows_are_read(prune: Prune) -> None:
    settings = ["depth.num_layers=2", "overwrite_output_dir=true"]
    every = [scores(prune(*settings, f"seed={seed}", "batch_size=3")) for seed in (0, 0, 1)]
    assert every[0] == every[1]
    assert every[0] != every[2], "other six of the ten rows"
    one = scores(prune(*settings, "num_batches=10", "batch_size=1"))
    other = scores(prune(*settings, "seed=1"))
    assert one["layers"]["scores"] == pytest.approx(other["layers"]["scores"], rel=1e-3), "all of them"


def test_dry_run_writes_nothing(prune: Prune, capsys: pytest.CaptureFixture[str]) -> None:
    run = prune("depth.num_layers=2", "--dry-run")
    assert not run.exists()
    out = capsys.readouterr().out
    assert "4 layers of 32" in out
    assert "2 layers of 32" in out


def test_an_older_run_is_kept_or_replaced(prune: Prune) -> None:
    run = prune("depth.num_layers=2")
    with pytest.raises(SystemExit):
        prune("depth.num_layers=3")
    assert load(run / "model").config.num_layers == 2
    prune("depth.num_layers=3", "overwrite_output_dir=true")
    assert load(run / "model").config.num_layers == 3


REFUSED = {
    "Nothing is to be left out. Give depth.num_layers or depth.keep_layers, or a size of width": [],
    "depth.num_layers=4 leaves out no layer": ["depth.num_layers=4"],
    "keep_layers=[2, 1] must name layers of the model in increasing order": ["depth.keep_layers=[2,1]"],
    "depth.importance=perplexity is about how layers are chosen": ["width.num_heads=2", "depth.importance=perplexity"],
    "width.hidden_size=33 leaves out nothing: the model has 32": ["width.hidden_size=33"],
    "are 20 rows, and the dataset has 10. Take num_batches=2": ["depth.num_layers=2", "num_batches=4"],
    "dataset.packed=true saves padding in training": ["depth.num_layers=2", "dataset.packed=true"],
    "the model was built for 128 positions": ["depth.num_layers=2", "tokenizer.max_seq_len=129"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_a_weight_is_read(
    message: str, prune: Prune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(SystemExit):
        prune(*REFUSED[message])
    assert message in " ".join(capsys.readouterr().err.split())


def test_one_of_several_processes_is_refused(
    prune: Prune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        prune("depth.num_layers=2")
    assert "prune runs in one process" in capsys.readouterr().err


def test_broken_weights_are_no_scores(
    prune: Prune, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(whole)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    broken = shutil.copytree(whole, tmp_path / "broken")
    save_file(dict(model.named_parameters()), broken / "model.safetensors")
    with pytest.raises(SystemExit):
        prune("depth.num_layers=2", f"checkpointer.checkpoint_dir={broken}")
    assert "The cross-entropy of the model is nan" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tiny_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["run", "prune", "--config", "tiny"])
    pruned, whole = (load(folder).config for folder in (tmp_path / "runs/tiny_pruned/model", TEACHER_ASSETS))
    assert (pruned.num_layers, pruned.hidden_size) == (3, 128)
    assert (pruned.intermediate_size, pruned.num_heads) == (256, 2)
    assert pruned.head_dim == whole.head_dim
