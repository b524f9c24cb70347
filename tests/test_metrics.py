"""Numbers get to the file at once, whole lines only, once per step; sinks that are missing are refused."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kdtune import metrics
from kdtune.distributed import Ranks
from kdtune.metrics import MetricLogger, MetricLoggerConfig, Throughput


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, MetricLoggerConfig(), {})
    logger.log(0, {"val_loss": 2.5})
    logger.log(1, {"loss": 1.0, "num_tokens": 7})
    assert read(tmp_path) == [{"step": 0, "val_loss": 2.5}, {"step": 1, "loss": 1.0, "num_tokens": 7}]
    logger.close()


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, MetricLoggerConfig(), {})
    logger.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.0}\n'
    logger.close()


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricLogger(tmp_path, MetricLoggerConfig(), {}).close()
    assert read(tmp_path) == []


@pytest.mark.parametrize("rest", ["", '{"st', '{"step": 3, "loss": 1.0}'])
def test_a_resumed_run_drops_what_it_repeats(rest: str, tmp_path: Path) -> None:
    """Lines after its checkpoint, and a last line that was not finished."""
    written = [{"step": 0, "val": 1}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}, {"step": 2, "val": 4}]
    repeated = [{"step": 3, "loss": 5.0}, {"step": 4, "loss": 6.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written + repeated) + rest)
    logger = MetricLogger(tmp_path, MetricLoggerConfig(), {}, resumed_step=2)
    assert read(tmp_path) == written
    logger.log(3, {"loss": 7.0})
    assert read(tmp_path) == [*written, {"step": 3, "loss": 7.0}]
    assert logger.logged(2, "val") == {"step": 2, "val": 4}
    assert logger.logged(2, "loss") == {"step": 2, "loss": 3.0}
    assert logger.logged(9, "loss") is None
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_is_imported_only_when_asked(tmp_path: Path) -> None:
    MetricLogger(tmp_path, MetricLoggerConfig(), {}).close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("package", "cfg"),
    [("tensorboard", MetricLoggerConfig(tensorboard=True)), ("wandb", MetricLoggerConfig(wandb_project="kd"))],
)
def test_a_missing_sink_is_refused(package: str, cfg: MetricLoggerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=rf"asks for {package}, which is not installed. .*'kdtune\[{package}\]'"):
        metrics.check_sinks(cfg)
    metrics.check_sinks(MetricLoggerConfig())


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Wandb:
        """What is used of the package."""

        __spec__ = importlib.util.spec_from_loader("wandb", None)

        @staticmethod
        def init(**settings: Any) -> type[Wandb]:
            calls.append(settings)
            return Wandb

        @staticmethod
        def log(values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        @staticmethod
        def finish() -> None:
            calls.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    logger = MetricLogger(tmp_path, MetricLoggerConfig(wandb_project="kd"), {"seed": 3})
    logger.log(1, {"loss": 2.0})
    logger.close()
    assert calls == [
        {"project": "kd", "dir": str(tmp_path), "config": {"seed": 3}},
        (1, {"loss": 2.0}),
        "finished",
    ]


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    throughput = Throughput()
    throughput.add(30)
    throughput.add(10)
    now += 4
    assert throughput.read() == 10
    throughput.add(6)
    now += 2
    assert throughput.read() == 3, "since it was last read"
    now += 1000  # a validation
    throughput.restart()
    throughput.add(5)
    now += 5
    assert throughput.read() == 1


def test_peak_memory() -> None:
    cpu = torch.device("cpu")
    before, resident = metrics.peak_memory_gib(cpu), psutil.Process().memory_info().rss / 2**30
    assert 0.05 < resident < before + 0.01
    tensor = torch.ones(int((before - resident + 0.125) * 2**28))  # an eighth beyond the peak
    assert metrics.peak_memory_gib(cpu) == pytest.approx(before + 0.125, abs=0.06)
    del tensor
    assert metrics.peak_memory_gib(cpu) == pytest.approx(before + 0.125, abs=0.06), "the peak stays"


@pytest.mark.parametrize(
    ("size", "others"), [(1, {}), (2, {"rank_0": 1.0, "rank_1": 3.0}), (9, {"least": 1.0})], ids=lambda case: str(case)
)
def test_peak_memory_of_several(size: int, others: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged stays short, however many there are."""
    monkeypatch.setattr(Ranks, "gather", lambda ranks, value: [value, 3.0, *[2.0] * 7][: ranks.size])
    monkeypatch.setattr(metrics, "peak_memory_gib", lambda device: 1.0)
    found = metrics.peak_memory(Ranks(torch.device("cpu"), size=size))
    named = {f"peak_memory_gib/{name}": value for name, value in others.items()}
    assert found == {"peak_memory_gib": 1.0 if size == 1 else 3.0, **named}
