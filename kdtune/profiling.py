"""A record of a few steps: which operator ran when and for how long, who called it, and who took memory."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from kdtune.config import setting

_TOP = 10  # operators that are printed
_SNAPSHOT_ENTRIES = 100_000  # allocations and frees that a snapshot remembers, several KB each


@dataclass
class ProfilerConfig:
    """Record some steps into `output_dir/profile`. It slows those steps down and changes no number of the run."""

    enabled: bool = False  # record a few steps, once
    wait_steps: int = setting(5, ge=0)  # steps before: the first ones compile, and ask the system for memory
    warmup_steps: int = setting(3, ge=0)  # steps then that are recorded and forgotten, since starting takes time
    active_steps: int = setting(2, gt=0)  # steps then that are recorded and written
    record_shapes: bool = True  # also the shapes of what operators are given
    with_stack: bool = False  # also the lines of Python that call them; slow
    profile_memory: bool = False  # also what operators take and free; on CUDA a snapshot of the allocator as well

    @property
    def num_steps(self) -> int:
        return self.wait_steps + self.warmup_steps + self.active_steps


def check_profiler(cfg: ProfilerConfig, num_steps: int) -> None:
    """Refuse a record that would not be made.

    Args:
        cfg: what was asked for.
        num_steps: of the run. One that is resumed near its end records what is left.

    Raises:
        ValueError: says why.
    """
    changed = [key for key, value in dataclasses.asdict(ProfilerConfig()).items() if getattr(cfg, key) != value]
    if changed and not cfg.enabled:
        raise ValueError(
            f"profiler.{changed[0]}={getattr(cfg, changed[0])} is about a record of steps, and with "
            "profiler.enabled=false there is none. Set profiler.enabled=true as well, or leave it out."
        )
    if cfg.enabled and cfg.num_steps > num_steps:
        raise ValueError(
            f"profiler.wait_steps + warmup_steps + active_steps = {cfg.num_steps}, and the run has {num_steps} steps. "
            "Make them fewer, or the run longer."
        )


class Profiler:
    """Records while it is entered, and is told of each step.

    with Profiler(cfg, folder, device, done) as profiler:
        for step in ...:
            ...
            profiler.step()
    """

    def __init__(self, cfg: ProfilerConfig, folder: Path, device: torch.device, done: int) -> None:
        """
        Args:
            cfg: what to record, if anything.
            folder: where it goes; made when there is something.
            device: where the run computes.
            done: optimizer steps of the run before.
        """
        self._cfg, self._folder, self._done = cfg, folder, done
        self._is_cuda = device.type == "cuda"
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> Profiler:
        if self._cfg.enabled:
            cfg, kinds = self._cfg, torch.profiler.ProfilerActivity
            self._first, self._end = self._done + cfg.wait_steps + cfg.warmup_steps + 1, self._done + cfg.num_steps
            self._profile = torch.profiler.profile(
                activities=[kinds.CPU, kinds.CUDA] if self._is_cuda else [kinds.CPU],
                schedule=torch.profiler.schedule(
                    wait=cfg.wait_steps, warmup=cfg.warmup_steps, active=cfg.active_steps, repeat=1
                ),
                on_trace_ready=self._write,
                record_shapes=cfg.record_shapes,
                profile_memory=cfg.profile_memory,
                with_stack=cfg.with_stack,
            )
            self._profile.__enter__()
            self._watch_allocator()
        return self

    def step(self) -> None:
        """An optimizer step of the run is over."""
        self._done += 1
        if self._profile is not None:
            self._profile.step()
            self._watch_allocator()

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, value, traceback)

    def _watch_allocator(self) -> None:
        if self._is_cuda and self._cfg.profile_memory and self._done + 1 == self._first:
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)

    def _write(self, record: Any) -> None:
        """Called by torch when the active steps are over, or the run is."""
        steps = f"steps_{self._first}_to_{min(self._end, self._done)}"
        self._folder.mkdir(exist_ok=True)
        if self._is_cuda and self._cfg.profile_memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{steps}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        path = self._folder / f"{steps}.json.gz"
        record.export_chrome_trace(str(path))
        tqdm.write(f"profile of {steps.replace('_', ' ')}: {path}, to be opened in https://ui.perfetto.dev")
        tqdm.write(_table(record.key_averages(), on_device=self._is_cuda), file=sys.stdout)


def _table(operators: Any, on_device: bool) -> str:
    """The operators that took most time themselves."""

    def time(operator: Any) -> float:
        return operator.self_device_time_total if on_device else operator.self_cpu_time_total

    total = sum(map(time, operators)) or 1.0
    rows = sorted(operators, key=time, reverse=True)[:_TOP]
    lines = [f"{'operator':<56}{'calls':>8}{'ms':>12}{'share':>8}"]
    lines += [f"{row.key[:55]:<56}{row.count:>8}{time(row) / 1e3:>12.1f}{time(row) / total:>8.1%}" for row in rows]
    return "\n".join(lines)
