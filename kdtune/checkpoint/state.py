"""What a run needs to continue as if it had never stopped, written so that a crash at any moment loses nothing.

    output_dir/
        config.yaml, recipe.py, versions.json, metrics.jsonl
        checkpoints/step_00000120/    a Hugging Face folder, plus training_state.pt
        model/                        the finished student: a Hugging Face folder and nothing else

A folder is written aside under a name that starts with a dot, flushed to the disk and then renamed: whatever carries
its final name is complete.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdtune import __version__

STATE_FILE = "training_state.pt"
_FOLDER = re.compile(r"step_(\d+)")


def prepare_output_dir(output_dir: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Decide what happens to an `output_dir` that already holds a run.

    Returns:
        The newest complete checkpoint if the run is to be resumed and has one, else None.

    Raises:
        ValueError: both at once.
        FileExistsError: the folder holds a run and neither `resume` nor `overwrite` was asked for.
    """
    if resume and overwrite:
        raise ValueError("resume_from_checkpoint and overwrite_output_dir exclude each other: continue, or start again?")
    if resume:
        return latest(output_dir)
    held = [name for name in ("checkpoints", "model", "metrics.jsonl") if (output_dir / name).exists()]
    if held and not overwrite:
        raise FileExistsError(
            f"output_dir {output_dir} already holds a run ({', '.join(held)}). Continue it with "
            "resume_from_checkpoint=true, choose another output_dir, or delete it with overwrite_output_dir=true."
        )
    return None


def clear_output_dir(output_dir: Path) -> None:
    """Delete what an earlier run wrote there, and nothing else."""
    for name in ("checkpoints", "model", "tensorboard"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)


def record_run(output_dir: Path, config_yaml: str, recipe: Path) -> None:
    """Leave what reproduces the run: the resolved config, the recipe's source, the versions."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.yaml").write_text(config_yaml)
    shutil.copyfile(recipe, output_dir / "recipe.py")
    versions = {"kdtune": __version__, "torch": torch.__version__, "python": platform.python_version()}
    (output_dir / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = _checkpoints(output_dir)
    return found[-1] if found else None


def save(output_dir: Path, step: int, write_model: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write `checkpoints/step_N`, then delete the older ones.

    Args:
        output_dir: folder of the run.
        step: optimizer steps done.
        write_model: writes the Hugging Face folder into the path it is given.
        state: tensors, numbers, strings and containers of them; the random states are added here.
    """
    older = _checkpoints(output_dir)

    def write(folder: Path) -> None:
        write_model(folder)
        torch.save({**state, "step": step, "random": _random_state()}, folder / STATE_FILE)

    folder = write_aside(output_dir / "checkpoints" / f"step_{step:08d}", write)
    for old in older:
        if old != folder:
            shutil.rmtree(old)
    return folder


def load(folder: Path) -> dict[str, Any]:
    """The state that `save` was given and `step`; sets the random states as they were.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{folder / STATE_FILE} cannot be read ({error}). Delete {folder} to resume from an older checkpoint, "
            "or start again with overwrite_output_dir=true."
        ) from error
    random = state.pop("random")
    torch.set_rng_state(random["cpu"])
    if random["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(random["accelerator"])
    return state


def write_aside(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a folder beside `folder`, flush it to the disk and rename it into place, replacing an older one.

    Raises:
        OSError: the disk is full or not writable; `folder` is then as it was.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for path in sorted(aside.rglob("*")):
        _flush(path)
    _flush(aside)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def _checkpoints(output_dir: Path) -> list[Path]:
    folders = [p for p in (output_dir / "checkpoints").glob("step_*") if _FOLDER.fullmatch(p.name)]
    return sorted((p for p in folders if (p / STATE_FILE).is_file()), key=lambda p: p.name)


def _random_state() -> dict[str, Any]:
    accelerator = torch.get_device_module().get_rng_state() if torch.accelerator.is_available() else None
    return {"cpu": torch.get_rng_state(), "accelerator": accelerator}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
