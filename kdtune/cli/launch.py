"""`kdtune run --nproc-per-node N`: torchrun's options, and what a launch checks before it starts processes."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from kdtune.cli import rank, recipe
from kdtune.cli.parser import Parser


def _matches(pattern: str, what: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    check.__name__ = what  # argparse puts it into "invalid ... value"
    return check


_NUMBER = _matches(r"\d+", "number")

# Of torchrun, which explains them at length: name, placeholder, form, meaning.
OPTIONS: tuple[tuple[str, str, Callable[[str], str], str], ...] = (
    ("nproc-per-node", "N", _matches(r"[1-9]\d*|[a-z]+", "number"), "processes on each machine; gpu: one for each GPU"),
    ("nnodes", "N", _matches(r"[1-9]\d*(:[1-9]\d*)?", "number"), "machines; min:max if they may come and go"),
    ("rdzv-endpoint", "HOST:PORT", str, "where machines meet: one of them"),
    ("rdzv-backend", "NAME", str, "how they meet: c10d, or static with the next three"),
    ("rdzv-id", "ID", str, "which of them belong together"),
    ("rdzv-conf", "KEY=VALUE,...", str, "more about how they meet, such as join_timeout=600"),
    ("node-rank", "N", _NUMBER, "number of this machine, from 0 (static)"),
    ("master-addr", "HOST", str, "the machine with number 0 (static)"),
    ("master-port", "PORT", _NUMBER, "a free port there (static)"),
    ("local-addr", "HOST", str, "how the others reach this machine, if its own name does not"),
    ("max-restarts", "N", _NUMBER, "how often to start again after a failure, from the newest checkpoint"),
)


def add_options(parser: Parser) -> None:
    """Let a command take torchrun's options, in both of its spellings."""
    group = parser.add_argument_group("several processes, as torchrun starts them")
    for name, placeholder, form, meaning in OPTIONS:
        group.add_argument(f"--{name}", metavar=placeholder, type=form, help=meaning)
        if "-" in name:
            group.add_argument(f"--{name.replace('-', '_')}", type=form, help=argparse.SUPPRESS)
    group.add_argument("--standalone", action="store_true", help="one machine, whatever else is given")


def options(call: recipe.Call) -> list[str]:
    """Those of torchrun's options that were given, as it takes them.

    Raises:
        ValueError: the number of processes is not among them, or this process is one of several already.
    """
    values = {name: getattr(call.options, name.replace("-", "_")) for name, *_ in OPTIONS}
    given = [f"--{name}={value}" for name, value in values.items() if value is not None]
    given += ["--standalone"] * call.options.standalone
    if call.options.help or not given:
        return []
    if rank.is_one():
        raise ValueError(
            f"This process is number {os.environ['RANK']} of {os.environ['WORLD_SIZE']} that torchrun or the like "
            f"started (RANK, WORLD_SIZE): leave {given[0]} to it."
        )
    if values["nproc-per-node"] is None:
        raise ValueError(
            f"{given[0]} without --nproc-per-node: say how many processes there are on a machine, or gpu for all GPUs."
        )
    return given


def run(call: recipe.Call, options: list[str]) -> None:
    """Check the settings once, then let processes run the recipe.

    Raises:
        ValueError: in the settings, or they do not go with the number of processes.
        SystemExit: with the status of the processes, unless that is 0.
    """
    # torch reads it once. Else stack traces of C++ tell that the launcher of another machine is not there.
    has_chosen = "TORCH_CPP_LOG_LEVEL" in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    cfg = recipe.settings(recipe.load_module(call.recipe), call)
    from kdtune import launching

    if not has_chosen:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # ranks say what they have to

    if os.getcwd() not in sys.path:  # so that ranks import what this process does
        os.environ["PYTHONSAFEPATH"] = "1"
    config: list[Any] = ["--config", call.options.config[0]] if call.options.config else []
    dry_run = ["--dry-run"] * call.options.dry_run
    status = launching.launch(cfg, options, ["-m", "kdtune", "run", call.name, *config, *dry_run, *call.overrides])
    if status:
        raise SystemExit(status)
