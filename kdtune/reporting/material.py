"""What a report is made of: the folders that were given, told apart and read."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtune.evaluation import results
from kdtune.reporting.runs import METRICS, Run, read_run

SWEEP = "sweep.json"
SWEEP_VERSION = 1
MOST_RUNS = 200  # more would be one curve on the other


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and what the report calls it."""

    name: str
    folder: Path
    evaluation: results.Evaluation
    tokens: list[results.TokenExample]
    responses: list[results.Response]


@dataclass(frozen=True)
class Material:
    """All that was found, in the order given."""

    runs: list[Run]
    evaluations: list[Evaluated]
    warnings: list[str]


def read(folders: Sequence[Path]) -> Material:
    """Runs, evaluations and sweeps.

    Args:
        folders: each an output_dir of one of them, or of several at one time; the same twice counts once.

    Raises:
        ValueError, OSError: what is wrong with which folder, and what to do.
    """
    runs: dict[Path, str | None] = {}  # -> variant
    evaluations: dict[Path, None] = {}
    warnings: list[str] = []
    for folder in folders:
        _check(folder)
    sweeps = {folder.resolve() for folder in folders if (folder / SWEEP).is_file()}
    for folder in folders:
        is_sweep = (folder / SWEEP).is_file()
        members = _sweep(folder, warnings, with_name=len(sweeps) > 1) if is_sweep else [(folder, None)]
        for member, variant in members:
            if (member / METRICS).is_file():
                runs.setdefault(member.resolve(), variant)
            if (member / results.MAIN).is_file():
                evaluations.setdefault(member.resolve())
    if len(runs) > MOST_RUNS:
        raise ValueError(f"These are {len(runs):,} runs; a chart of more than {MOST_RUNS} shows nothing. Give fewer.")
    run_names, evaluation_names = _names(list(runs)), _names(list(evaluations))
    return Material(
        runs=[read_run(folder, run_names[folder], variant) for folder, variant in runs.items()],
        evaluations=[
            Evaluated(
                *(evaluation_names[folder], folder, results.read(folder)),
                *(results.read_tokens(folder), results.read_responses(folder)),
            )
            for folder in evaluations
        ],
        warnings=warnings,
    )


def _check(folder: Path) -> None:
    """Refuse what is neither a run nor an evaluation nor a sweep."""
    kinds = f"a run ({METRICS} in it), an evaluation ({results.MAIN}) or a sweep ({SWEEP})"
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder. Give the output_dir of {kinds}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file. Give the folder that it is in: the output_dir of {kinds}.")
    names = (METRICS, results.MAIN, SWEEP)
    if _has(folder, *names):
        return
    inside = sorted(path.parent for name in names for path in folder.glob(f"*/{name}"))
    if _has(folder.parent, *names):
        hint = f"Its parent is one: kdtune report {folder.parent}"
    elif inside:
        hint = f"There are some in it: kdtune report {folder}/*" if len(inside) > 1 else f"Meant is {inside[0]}?"
    elif (folder / "config.yaml").is_file():
        hint = "It has a config.yaml: the run has not begun to train, or its recipe logs no steps."
    else:
        hint = "Give the output_dir of one."
    raise ValueError(f"{folder} is not {kinds}. {hint}")


def _sweep(folder: Path, warnings: list[str], *, with_name: bool) -> list[tuple[Path, str | None]]:
    """Folders of the runs that have begun, and their variants, of several sweeps with the name of this one."""
    path = folder / SWEEP
    try:
        sweep = json.loads(path.read_text(encoding="utf-8"))
        version = sweep["kdtune_sweep"]
        prefix = f"{folder.resolve().name}: " if with_name else ""
        listed = [(folder / run["name"], _variant(prefix, run["values"]), run.get("state")) for run in sweep["runs"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what kdtune sweep writes: {error!r}. Was it edited or cut short?") from None
    if version != SWEEP_VERSION:
        raise ValueError(
            f"{path} is of version {version!r}, and this kdtune reads {SWEEP_VERSION}. Make the report with the kdtune "
            "that ran the sweep, or give the folders of its runs one by one."
        )
    begun = [(run, variant) for run, variant, _ in listed if _has(run, METRICS, results.MAIN)]
    if not begun:
        raise ValueError(f"{folder}: none of the {len(listed)} runs of this sweep has begun. Report it later.")
    if missing := [run.name for run, _, _ in listed if not _has(run, METRICS, results.MAIN)]:
        warnings.append(f"{folder.name}: {len(missing)} of {len(listed)} runs have not begun: {', '.join(missing)}")
    if failed := [run.name for run, _, state in listed if state == "failed"]:
        warnings.append(f"{folder.name}: {len(failed)} of {len(listed)} runs failed: {', '.join(failed)}")
    return begun


def _variant(prefix: str, values: Mapping[str, Any]) -> str | None:
    """All that a run has in common with those of other seeds."""
    said = ", ".join(f"{key}={value}" for key, value in values.items() if key != "seed")
    return prefix + said if said else None


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The part of each path that tells it from the others."""
    if len(folders) == 1:
        return {folders[0]: folders[0].name}
    common = os.path.commonpath(folders) if folders else ""
    return {folder: folder.relative_to(common).as_posix() for folder in folders}
