"""Numbers of a run: to a file always, to a progress bar, to TensorBoard or Weights & Biases when asked."""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kdtune.config import setting
from kdtune.distributed import Ranks

_MOST_RANKS = 8  # of which each has a number of its own in every line


@dataclass
class MetricLoggerConfig:
    """Where the metrics go besides `output_dir/metrics.jsonl`."""

    tensorboard: bool = False  # also write TensorBoard events to output_dir/tensorboard
    wandb_project: str | None = setting(None)  # also send to this Weights & Biases project; null: send nothing


class MetricLogger:
    """One JSON object per call in `output_dir/metrics.jsonl`, flushed at once, and the sinks that were asked for."""

    def __init__(
        self,
        output_dir: Path,
        cfg: MetricLoggerConfig,
        run_config: Mapping[str, Any],
        resumed_step: int = 0,
        is_first: bool = True,
    ):
        """
        Args:
            output_dir: folder of the run.
            cfg: the sinks.
            run_config: the resolved settings, sent to Weights & Biases.
            resumed_step: a resumed run repeats the steps after its checkpoint; their old lines are dropped.
            is_first: False for all but one of the processes of a run: nothing is recorded.

        Raises:
            ValueError: a sink was asked for and its package is not installed.
        """
        check_sinks(cfg)
        self._is_first = is_first
        if not is_first:
            return
        path = self._path = output_dir / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resumed_step] if resumed_step else []
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(kept))
        aside.replace(path)
        self._file = path.open("a")
        self._tensorboard = None
        self._wandb = None
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=resumed_step + 1)
        if cfg.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(project=cfg.wandb_project, dir=str(output_dir), config=dict(run_config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at an optimizer step (from 1; 0 is before training)."""
        if not self._is_first:
            return
        # JSON has no NaN: a number that is not finite is written as null.
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def logged(self, step: int, key: str) -> dict[str, float] | None:
        """What was logged at `step` together with `key`, also before the run was resumed; None if nothing was."""
        if not self._is_first:
            return None
        lines = (json.loads(line) for line in _lines(self._path))
        return next((line for line in lines if line["step"] == step and key in line), None)

    def close(self) -> None:
        """Flush and close every sink."""
        if not self._is_first:
            return
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class Throughput:
    """Labelled tokens per second since it was last read."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Leave out what happened since: a validation, a checkpoint."""
        self._tokens, self._since = 0, time.perf_counter()

    def add(self, num_tokens: int) -> None:
        self._tokens += num_tokens

    def read(self) -> float:
        rate = self._tokens / (time.perf_counter() - self._since)
        self.restart()
        return rate


def check_sinks(cfg: MetricLoggerConfig) -> None:
    """Refuse a sink whose package is not installed, before anything is loaded.

    Raises:
        ValueError: says what to install.
    """
    from importlib.util import find_spec

    wanted = {"tensorboard": cfg.tensorboard, "wandb": cfg.wandb_project is not None}
    for package, asked in wanted.items():
        if asked and find_spec(package) is None:
            raise ValueError(
                f"metric_logger asks for {package}, which is not installed. "
                f"Install it (pip install 'kdtune[{package}]') or leave it out: metrics.jsonl is always written."
            )


def progress_bar(total: int, initial: int = 0) -> tqdm:
    """A bar over optimizer steps: done, left, time left; `set_postfix` adds the numbers of the step."""
    # In a log file each refresh stays: one in half a minute is enough there.
    interval = 0.1 if sys.stdout.isatty() else 30.0
    shown = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
    return tqdm(
        total=total, initial=initial, mininterval=interval, dynamic_ncols=True, file=sys.stdout, bar_format=shown
    )


def token_bar(total: int, unit: str = " tokens") -> tqdm:
    """A bar over tokens, or other things: done, left, tokens/s, time left."""
    interval = 0.1 if sys.stdout.isatty() else 30.0
    return tqdm(total=total, mininterval=interval, dynamic_ncols=True, file=sys.stdout, unit=unit, unit_scale=True)


def closing_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Student before and after distillation, and the teacher, on the validation rows."""
    keys = ("val_ce_loss", "val_kd_loss", "val_agreement")
    rows = {"student before": [before[key] for key in keys], "student after": [after[key] for key in keys]}
    rows["teacher"] = [after["val_teacher_ce_loss"], 0.0, 1.0]
    lines = [f"{'validation':<16}{'ce':>8}{'KL to teacher':>16}{'top-1 agreement':>18}"]
    lines += [f"{name:<16}{ce:>8.3f}{kl:>16.3f}{agreement:>18.1%}" for name, (ce, kl, agreement) in rows.items()]
    return "\n".join(lines)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far: the allocator's on an accelerator, the process's resident set on the CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    # On Linux ru_maxrss starts from the peak of the parent process; some sandboxes know nothing better.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, kilobytes on Linux


def peak_memory(ranks: Ranks) -> dict[str, float]:
    """What is logged of it: `peak_memory_gib` of the rank that used the most; of several also each, of many the least.

    With one process for each GPU, ranks differ where a pipeline's stages, or what is left over of a cut, do.
    """
    peaks = ranks.gather(peak_memory_gib(ranks.device))
    if len(peaks) > _MOST_RANKS:
        by_rank = {"least": min(peaks)}
    else:
        by_rank = {f"rank_{rank}": peak for rank, peak in enumerate(peaks) if len(peaks) > 1}
    return {"peak_memory_gib": max(peaks), **{f"peak_memory_gib/{name}": peak for name, peak in by_rank.items()}}


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A line that a crash cut short is the last one, and belongs to a step that is repeated.
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def pool(by_source: Mapping[str, tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Means over all sources, and `<key>/<source>` for those of each where there are several.

    Args:
        by_source: name of each -> its means, and the tokens that they were taken over.
    """
    if len(by_source) == 1:
        ((means, _),) = by_source.values()
        return dict(means)
    total = sum(count for _, count in by_source.values())
    pooled: dict[str, float] = {}
    for means, count in by_source.values():
        for key, mean in means.items():
            pooled[key] = pooled.get(key, 0.0) + mean * count / total
    return pooled | {f"{key}/{source}": mean for source, (means, _) in by_source.items() for key, mean in means.items()}
