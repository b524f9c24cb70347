"""Several processes for one recipe: torchrun's agent, with one message when it fails and an order to its end.

The agent starts the processes of one machine and meets those of the others (rendezvous). What is different here:

* A signal is handed on to the processes, which finish their step, save and end by themselves.
* When one fails, the others have two seconds to say the same or to end; then all that is said is the reason.
* A mistake of the user is not tried again (`--max-restarts`), all else is, from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from kdtune.distributed import check_layout

LAUNCHED = "KDTUNE_LAUNCHED"  # tells processes that their reports are read, and that they may all end by themselves
_PATIENCE = 2.0  # seconds in which processes may follow one that failed


def launch(cfg: Any, options: Sequence[str], command: Sequence[str]) -> int:
    """Run a command in several processes, as torchrun does, until all have ended.

    Args:
        cfg: the recipe's settings, of which `parallel` says how models are spread.
        options: torchrun's.
        command: arguments of `python` for each process.

    Returns:
        The exit status: 0; of the first process that failed; or 128 + the number of the signal that ended the run.

    Raises:
        ValueError: the options or the settings do not go with the number of processes, or other machines are not found.
    """
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # torchrun tells each step of an end, with tracebacks of its own
    with tempfile.TemporaryDirectory(prefix="kdtune_", ignore_cleanup_errors=True) as folder:
        args = torchrun.get_args_parser().parse_args([*options, f"--log-dir={folder}", "kdtune"])
        _meet_here(args)
        config = _config(args)
        if config.min_nodes == config.max_nodes:
            _check(cfg, config.max_nodes * config.nproc_per_node)
        parameters = RendezvousParameters(
            config.rdzv_backend,
            config.rdzv_endpoint,
            config.run_id,
            config.min_nodes,
            config.max_nodes,
            local_addr=config.local_addr,
            **config.rdzv_configs,
        )
        is_static = config.rdzv_backend == "static"
        try:
            spec = WorkerSpec(
                role=config.role,
                local_world_size=config.nproc_per_node,
                entrypoint=sys.executable,
                args=tuple(command),
                rdzv_handler=get_rendezvous_handler(parameters),
                max_restarts=config.max_restarts,
                monitor_interval=config.monitor_interval,
                master_addr=args.master_addr if is_static else None,
                master_port=args.master_port if is_static else None,
                local_addr=config.local_addr,
            )
            os.environ[LAUNCHED] = "1"
            if config.max_restarts:
                # A store that outlives a start keeps the addresses of processes that are gone: pytorch issue 135712.
                os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
            assert config.logs_specs is not None
            agent = _Agent(spec, config.logs_specs)
            with agent.handing_on_signals():
                try:
                    return agent.status(agent.run())
                finally:
                    spec.rdzv_handler.shutdown()  # other machines then do not wait for this one
        except SignalException as error:
            return 128 + error.sigval
        except RendezvousClosedError as error:
            raise ValueError("The launcher of another machine has ended the run: it says why.") from error
        except (RendezvousError, torch.distributed.DistError) as error:
            reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(
                f"The launchers of {args.nnodes} machines did not meet at {config.rdzv_endpoint} ({reason}). Start the "
                "same command on each, with the same --rdzv-id and --rdzv-endpoint, which all can reach."
            ) from error


def _meet_here(args: Any) -> None:
    """Without other machines, processes meet on this one, at a free port."""
    _, most = torchrun.parse_min_max_nnodes(args.nnodes)
    given = args.rdzv_endpoint or args.master_port is not None or args.rdzv_backend != "static"
    if args.standalone or (most == 1 and not given):
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
        args.local_addr = args.local_addr or "localhost"  # the machine's own name is not known to each of them
    args.master_port = args.master_port or 29500


def _config(args: Any) -> torchrun.LaunchConfig:
    """torchrun's, but for threads: it gives each process one."""
    is_chosen = "OMP_NUM_THREADS" in os.environ
    threads = torch.get_num_threads()
    try:
        config, _, _ = torchrun.config_from_args(args)
    except ValueError as error:
        raise ValueError(f"--nproc-per-node={args.nproc_per_node}: {error}") from error
    if not is_chosen:
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // config.nproc_per_node))
    return config


def _check(cfg: Any, size: int) -> None:
    if hasattr(cfg, "parallel"):
        check_layout(cfg.parallel, size)
    elif size > 1:
        raise ValueError(
            f"This recipe has no setting `parallel`: {size} processes would all do the same. Run it without "
            "--nproc-per-node."
        )


@dataclass(frozen=True)
class _Cause:
    """Why processes failed.

    Attributes:
        status: exit status.
        text: the message.
        traceback: where it was raised, if that is to be shown.
        is_mistake: of the user.
    """

    status: int
    text: str
    traceback: str = ""
    is_mistake: bool = False


class _Agent(LocalElasticAgent):
    """torchrun's agent, which hands signals on, and finds one cause among failures that follow from each other."""

    _received: signal.Signals | None = None
    _cause: _Cause | None = None

    def status(self, result: RunResult | None) -> int:
        """The exit status for the result of `run`, after a message about a failure."""
        if self._cause is not None and (result is None or result.is_failed()):
            is_asked = self._received is not None and self._cause.status > 128
            if not is_asked:
                print(f"kdtune: error: {self._cause.text}\n{self._cause.traceback}", end="", file=sys.stderr)
                return self._cause.status
        if self._received is not None:
            return 128 + self._received
        files = [] if self._pcontext is None else [Path(path) for path in self._pcontext.error_files.values()]
        # A signal to another machine ends the processes of this one in order, too.
        return max((json.loads(path.read_text())["status"] for path in files if path.is_file()), default=0)

    @contextlib.contextmanager
    def handing_on_signals(self) -> Iterator[None]:
        """Hand Ctrl-C and SIGTERM on to the processes while this is entered; a second Ctrl-C stops them at once."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # what is left to the agent
        previous = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        running = [process for process in self._processes() if process.poll() is None]
        at_once = not running or (self._received is not None and number == signal.SIGINT)
        self._received = self._received or signal.Signals(number)
        self._remaining_restarts = 0
        for process in running:
            if at_once:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.send_signal(number)
        if at_once:
            raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [handler.proc for handler in handlers.values()]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started = super()._start_workers(worker_group)
        os.environ["KDTUNE_RESTARTED"] = "1"  # for the next: not every restart is counted, none for a new machine
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        stopped = self._stop_with_one_that_failed()
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            failures = {number: failure for number, failure in result.failures.items() if failure.pid not in stopped}
            self._cause = _find_cause(failures, len(worker_group.workers), (worker_group.group_world_size or 1) > 1)
            if self._cause.is_mistake:
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                most = worker_group.spec.max_restarts
                again = f"kdtune: restart {most - self._remaining_restarts + 1} of {most}"
                print(f"kdtune: {self._cause.text}\n{self._cause.traceback}{again}", file=sys.stderr)
        return result

    def _stop_with_one_that_failed(self) -> set[int]:
        """Wait for the processes to follow one that failed, and stop those that do not, as they wait for it.

        Returns:
            Those that had to be stopped.
        """
        processes = self._processes()
        if all(process.poll() in (None, 0) for process in processes):
            return set()
        deadline = time.monotonic() + _PATIENCE
        while (running := [p for p in processes if p.poll() is None]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
        return {process.pid for process in running}


def _find_cause(failures: dict[int, ProcessFailure], num_processes: int, has_others: bool = False) -> _Cause:
    """The failure that the others follow from.

    Args:
        failures: by rank, of processes that were not stopped for another's failure.
        num_processes: on this machine.
        has_others: there are other machines, whose processes may have failed first.
    """
    reports = {number: f.error_file_data for number, f in failures.items() if "status" in f.error_file_data}
    own = {number: report for number, report in reports.items() if not report["is_consequence"]}
    silent = {number: failure.exitcode for number, failure in failures.items() if number not in reports}
    if silent and not own:
        first, code = next(iter(silent.items()))
        if code > 0:
            return _Cause(code, f"rank {first} ended with exit status {code}.")
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return _Cause(128 - code, f"rank {first} was killed by {name}{hint}.")
    first, report = min((own or reports).items(), key=lambda item: item[1]["time"])
    message = report["message"]["message"]
    same = [number for number, other in reports.items() if other["message"]["message"] == message]
    text = message if len(same) == num_processes else f"rank {first}: {message}"
    is_mistake = report["status"] == 2
    shows_traceback = not is_mistake or os.environ.get("KDTUNE_TRACEBACK") == "1"
    if has_others and not own:
        text = f"rank {first} lost a process of another machine, whose launcher says why. ({message})"
        shows_traceback = False
    traceback = report["message"]["extraInfo"]["py_callstack"] if shows_traceback else ""
    return _Cause(report["status"], text, traceback, is_mistake)
