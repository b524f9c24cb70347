"""Runs whose rows come from workers, the cache, ready-made ids or a stream are the runs that they would be without."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from tiny_runs import distil, finetune

from kdtune import data, tokenizers
from kdtune.cli.main import main
from kdtune.data import DatasetConfig

RUNS = pytest.mark.parametrize("run", [distil, finetune])


@RUNS
def test_cached_rows_make_the_same_run(run: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((tiny / "rows.jsonl").read_text() + '{"prompt": "a", "completion": null}\n')
    plain = run(tiny, tmp_path / "plain")
    for name in ("first", "again"):
        cached = [f"dataset.cache_dir={tmp_path / 'cache'}", f"dataset.source={rows}", "dataset.on_error=skip"]
        tiny_runs.assert_same_run(run(tiny, tmp_path / name, *cached), plain)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_all_recipes_share_a_cached_set(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their models differ in the ids that they have."""
    settings = [f"dataset.cache_dir={tmp_path / 'cache'}"]
    tiny_runs.write_model(tmp_path / "larger", seed=1, num_hidden_layers=1, vocab_size=2112)
    main(["data", *tiny_runs.arguments(tiny, tmp_path / "run", *settings, recipe="finetune")[1:]])
    for recipe, model in [("finetune", tmp_path / "larger"), ("knowledge_distillation", tiny / "student")]:
        settings = [*settings, f"checkpointer.checkpoint_dir={model}", "--dry-run"]
        main(tiny_runs.arguments(tiny, tmp_path / "run", *settings, recipe=recipe))
    (folder,) = (tmp_path / "cache").iterdir()
    told = [line for line in capsys.readouterr().out.splitlines() if "tokenised rows" in line]
    assert told == [f"dataset: tokenised rows {what} {folder}" for what in ("written to", "found in", "found in")]


def test_rows_from_workers_make_the_same_run(tiny: Path, tmp_path: Path) -> None:
    settings = ["dataset.too_long=split", "tokenizer.max_seq_len=24"]
    plain = finetune(tiny, tmp_path / "plain", *settings)
    tiny_runs.assert_same_run(finetune(tiny, tmp_path / "workers", *settings, "dataset.num_workers=1"), plain)


@RUNS
def test_ready_made_ids_make_the_same_run(run: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    cfg = DatasetConfig(source=str(tiny / "rows.jsonl"), format="completion")
    examples = data.load(cfg, tokenizers.load(tiny / "student"), 64)
    with open(tmp_path / "ids.jsonl", "w") as file:
        for tokens, labels in (examples[i] for i in range(len(examples))):
            ids = [*tokens.tolist(), int(labels[-1])]
            file.write(json.dumps({"input_ids": ids, "labels": [data.IGNORE, *labels.tolist()]}) + "\n")
    settings = [f"dataset.source={tmp_path / 'ids.jsonl'}", "dataset.format=tokens"]
    tiny_runs.assert_same_run(run(tiny, tmp_path / "ids", *settings), run(tiny, tmp_path / "plain"))


@RUNS
def test_joined_documents_out_of_an_array(run: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(1, 330, dtype=np.uint16) % 200)
    settings = ["dataset.format=tokens", "dataset.join_documents=true", "dataset.document_end_id=7"]
    settings += ["epochs=1", "lr_scheduler.num_warmup_steps=0"]
    found = tiny_runs.steps(run(tiny, tmp_path / "run", f"dataset.source={tmp_path / 'ids.npy'}", *settings))
    assert len(found) == 2, "five full rows and the rest, four in a step"
    assert sum(line["num_tokens"] for line in found) == 328, "all but the first token are predicted"


@RUNS
def test_a_stopped_stream_goes_on(
    run: Callable[..., Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["dataset.streaming=true", "dataset.shuffle_buffer=3", "max_steps=7", "epochs=1", "save_every_n_steps=9"]
    whole = run(tiny, tmp_path / "whole", *settings)
    assert len(tiny_runs.steps(whole)) == 7, "more than two passes over ten rows"
    next_step = data.StreamLoader.next_step
    stopped = tmp_path / "stopped"
    for stop in (2, 2):
        count = 0

        def stopping(loader: data.StreamLoader, stop: int = stop) -> list[data.Batch]:
            nonlocal count
            count += 1
            if count == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return next_step(loader)

        monkeypatch.setattr(data.StreamLoader, "next_step", stopping)
        with pytest.raises(SystemExit):
            run(tiny, stopped, *settings, "resume_from_checkpoint=true")
    monkeypatch.setattr(data.StreamLoader, "next_step", next_step)
    tiny_runs.assert_same_run(run(tiny, stopped, *settings, "resume_from_checkpoint=true"), whole)


@RUNS
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dataset.streaming=true"], "Give max_steps"),
        (["dataset.streaming=true", "max_steps=3", "max_steps_per_epoch=2"], "max_steps_per_epoch=2 says nothing"),
        (["dataset.streaming=true", "max_steps=3", "dataset.packed=true"], "dataset.packed is for sets"),
        (["dataset.join_documents=true"], "join_documents=true is for dataset.format=text and tokens"),
        (["dataset.token_dtype=uint16"], "dataset.token_dtype is for dataset.format=tokens"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: Callable[..., Path],
    settings: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, "epochs=1", *settings)
    assert message in capsys.readouterr().err
