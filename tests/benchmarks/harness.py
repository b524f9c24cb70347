"""Run variants of one measurement in turns, each in a process of its own.

One process at a time is at work, so that none takes time from another; all stay alive from round to round, so that a
round is short and a busy machine slows its variants alike. Ratios are taken within a round, then their median.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kdtune import devices, metrics

Answer = dict[str, float]  # what one call of a variant measured


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        title: its name there.
        make: takes the program's settings, in the variant's own process; what it returns is called once a round.
    """

    title: str
    make: Callable[[argparse.Namespace], Callable[[], Answer]]


def make_parser(description: str | None, *, rounds: int, has_models: bool = True) -> argparse.ArgumentParser:
    """With the options that every program has, or every one that computes with models."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    common = parser.add_argument_group("of every benchmark")
    common.add_argument(
        "--variants", nargs="+", metavar="NAME", help="which to run, by their short names; all if absent"
    )
    common.add_argument(
        "--rounds", type=int, default=rounds, help="calls of each variant after the first, unmeasured one"
    )
    common.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a process on the CPU")
    if has_models:
        common.add_argument("--device", default="cpu", help="cpu, cuda")
        common.add_argument("--dtype", choices=devices.DTYPES, default="fp32", help="of weights and hidden states")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, variants: Mapping[str, Variant]) -> argparse.Namespace:
    """The settings; in a variant's own process this does not return: it measures when asked, until nobody asks."""
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.worker:
        _serve(variants[settings.worker], settings)
        raise SystemExit
    if unknown := set(settings.variants or ()) - set(variants):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}. There are {', '.join(variants)}.")
    return settings


def run(
    settings: argparse.Namespace, variants: Mapping[str, Variant], extra: Sequence[str] = ()
) -> dict[str, list[Answer]]:
    """Ask every variant in turn, `settings.rounds` times.

    Args:
        extra: arguments for the variants' processes beside those of this one.

    Returns:
        The answers of each variant, round by round, the first call left out. Variants that could not run are absent;
        a line says why.
    """
    with tempfile.TemporaryDirectory() as logs:
        workers = {name: _Worker(name, extra, Path(logs, name)) for name in settings.variants or variants}
        answers: dict[str, list[Answer]] = {name: [] for name in workers}
        # The first call imports, compiles, starts threads and takes memory from the system for the first time.
        for _ in range(1 + settings.rounds):
            for name in list(answers):
                if (answer := workers[name].ask()) is not None:
                    answers[name].append(answer)
                else:
                    del answers[name]
                    print(f"{variants[name].title}: left out. {workers[name].reason}", flush=True)
        for worker in workers.values():
            worker.close()
    return {name: found[1:] for name, found in answers.items()}


class Meter:
    """Time of a call, and by how much it raised the peak of memory above what was there before the first one."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before: float | None = None

    def __call__(self, call: Callable[[], float | None]) -> Answer:
        """Everything that is not to be counted must exist by now."""
        self._forget_peak()
        if self._before is None:
            self._before = metrics.peak_memory_gib(self._device)
        self._wait()
        cpu_before, wall_before = time.process_time(), time.perf_counter()
        result = call()
        self._wait()
        answer = {"cpu_s": time.process_time() - cpu_before, "wall_s": time.perf_counter() - wall_before}
        answer["memory_mib"] = (metrics.peak_memory_gib(self._device) - self._before) * 1024
        return answer if result is None else {**answer, "result": result}

    def _forget_peak(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
        elif (reset := Path("/proc/self/clear_refs")).exists():  # on Linux
            reset.write_text("5")

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def most_allocated(call: Callable[[], object]) -> int:
    """The bytes by which a call raises what torch's allocator of the CPU has given out, at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def load_compiler() -> None:
    """Take what torch.compile needs for itself, some 200 MiB for the life of the process, before memory is counted."""
    torch.compile(torch.neg)(torch.zeros(2))


def median(answers: Sequence[Answer], key: str) -> float:
    """Of one measured value over the rounds."""
    return statistics.median(answer[key] for answer in answers)


def ratio(answers: Sequence[Answer], floor: Sequence[Answer], key: str) -> float:
    """The median over the rounds of a value in units of the floor's in the same round."""
    return statistics.median(one[key] / other[key] for one, other in zip(answers, floor, strict=True))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In Markdown, the columns aligned for those who read it as it is."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def describe_machine(settings: argparse.Namespace) -> str:
    """Device, threads and the versions of what is measured."""
    packages = ("torch", "tokenizers", "transformers", "trl", "liger-kernel", "nvidia-modelopt", "torchtune", "peft")
    found = importlib.metadata.distributions()
    installed = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in found}
    versions = ", ".join(f"{package} {installed[package]}" for package in packages if package in installed)
    where = devices.describe(devices.resolve(getattr(settings, "device", "cpu")))
    dtype = f", {settings.dtype}" if "dtype" in settings else ""
    return f"{where}, {settings.threads} threads{dtype}; {versions}"


class _Worker:
    """A variant's process: it measures once for each line that it is sent."""

    def __init__(self, name: str, extra: Sequence[str], log: Path):
        self.reason = ""  # why there is no answer
        self._command = [sys.executable, *sys.argv, *extra, "--worker", name]
        self._log = log  # what libraries have to say, of interest only if there is no answer
        self._process: subprocess.Popen[str] | None = None

    def ask(self) -> Answer | None:
        # Started when it is first asked, so that it is alone while it imports and compiles.
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # it has ended
            self.reason = f"Its process ended with exit code {process.wait()}.\n{self._log.read_text()}"
            return None
        if "missing" in answer:
            self.reason = f"{answer['missing']}. Its packages come with pip install -e '.[peers]'."
            return None
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        # Threads that wait by spinning would measure, as CPU time, whatever else runs on the machine.
        defaults = {"OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        with self._log.open("w") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**defaults, **os.environ},
            )


def _serve(variant: Variant, settings: argparse.Namespace) -> None:
    # Libraries print; their lines go to stderr, and stdout holds nothing but answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        call = variant.make(settings)
        for _ in sys.stdin:
            print(json.dumps(call()), file=answers, flush=True)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
