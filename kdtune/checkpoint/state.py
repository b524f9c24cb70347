"""What a run needs to continue as if it had never stopped, written so that a crash at any moment loses nothing.

    output_dir/
        config.yaml, recipe.py, versions.json, metrics.jsonl
        checkpoints/step_00000120/    a Hugging Face folder or an adapter, plus training_state.pt
        model/                        the finished student: a Hugging Face folder and nothing else
        adapter/                      with lora, its adapter in PEFT's format

A folder is written aside under a name that starts with a dot, flushed to the disk and then renamed: whatever carries
its final name is complete.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kdtune import __version__, files
from kdtune.checkpoint.background import Background
from kdtune.checkpoint.spread import Spread, read_spread, write_spread
from kdtune.distributed import ALONE, Ranks, reshard
from kdtune.dtensors import held, local, whole
from kdtune.models import Decoder

if TYPE_CHECKING:
    pass


class Stateful(Protocol):
    """What can be stopped and continued: optimizer, schedule, loader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Beside:
    """What is trained beside a model and is in no folder of it, as a part of a run's state: `Decoder.beside`."""

    def __init__(self, model: Decoder) -> None:
        """All ranks that hold the model call this object's methods."""
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Whole weights by name, however many processes hold them."""
        reshard(self._model)
        return {name: whole(parameter.detach()) for name, parameter in self._model.beside.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        shapes = {name: parameter.shape for name, parameter in self._model.beside.named_parameters()}
        if shapes != {name: saved.shape for name, saved in state.items()}:
            raise ValueError(
                f"The checkpoint has other projections than hidden_loss.projection asks for: {', '.join(state)}, not "
                f"{', '.join(shapes)}. A run goes on with the settings that it began with: restore them."
            )
        for name, parameter in self._model.beside.named_parameters():
            local(parameter).copy_(state[name][held(parameter)])


def beside(model: Decoder) -> dict[str, Stateful]:
    """The part of a run's state, by name, that is trained beside a model; none if nothing is."""
    has_weights = model.beside is not None and any(True for _ in model.beside.parameters())
    return {"beside": Beside(model)} if has_weights else {}


class Trained(Protocol):
    """What training changes, a model or an adapter of one, and the processes that hold it. See `ModelWriter`."""

    @property
    def ranks(self) -> Ranks: ...

    def trained(self) -> dict[str, Tensor]: ...

    def write(self, folder: Path, trained: Mapping[str, Tensor], ranks: Ranks) -> None: ...


STATE_FILE = "training_state.pt"
_MARK = "versions.json"  # written before all else, so that a folder without it holds no run
_FINISHED = ("model", "adapter")
_EVALUATION = ("evaluation.json", "examples.jsonl", "tokens.json", "responses.jsonl", "evaluation.md", "tasks")
_RESULTS = ("checkpoints", *_FINISHED, "tensorboard", "profile", "metrics.jsonl", "importance.json", *_EVALUATION)
_WRITTEN = (*_RESULTS, "config.yaml", "recipe.py", _MARK)
_FOLDER = re.compile(r"step_(\d+)")


def prepare_output_dir(
    output_dir: Path, *, resume: bool | None, overwrite: bool, sources: Sequence[str | None]
) -> Path | None:
    """Decide what happens to an `output_dir` that already holds a run; nothing is touched yet.

    Args:
        output_dir: folder of the run; need not exist.
        resume: continue from its newest checkpoint, or start if there is none yet; None: such runs have no checkpoints.
        overwrite: without `resume`, an earlier run there may be deleted.
        sources: folders that this run reads, as far as there are any.

    Returns:
        The newest complete checkpoint if the run is to be resumed and has one, else None.

    Raises:
        ValueError: a source is part of the run that would be deleted.
        FileExistsError: the folder holds a run and neither `resume` nor `overwrite` was asked for, or `resume` was
            and there is only a finished model; or it holds files of these names that no run wrote.
        NotADirectoryError: a file is in the way.
    """
    for path in (output_dir, *output_dir.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"output_dir {output_dir} cannot be made: {path} is a file. Choose another one.")
    held = [name for name in _WRITTEN if (output_dir / name).exists()]
    if held and _MARK not in held:
        raise FileExistsError(
            f"output_dir {output_dir} holds {', '.join(held)}, and no run of kdtune wrote that (there is no {_MARK}). "
            "It would be replaced: choose another output_dir."
        )
    finished = [output_dir / name for name in _FINISHED if name in held]
    if resume and ((newest := latest(output_dir)) or not finished):
        return newest
    if resume:
        setting = "checkpointer.checkpoint_dir" if finished[0].name == "model" else "lora.start_from"
        raise FileExistsError(
            f"output_dir {output_dir} holds a finished model and no checkpoint to resume from. To train that model "
            f"further, start a new run with {setting}={finished[0]} and another output_dir."
        )
    for source in filter(None, sources):
        if any(output_dir.resolve() / name in (p := Path(source).resolve(), *p.parents) for name in _WRITTEN):
            raise ValueError(
                f"{source} is part of the run in output_dir {output_dir}, and this run would replace it while it "
                "starts from it. Choose another output_dir."
            )
    if held and not overwrite:
        resuming = "" if resume is None else "continue it with resume_from_checkpoint=true, "
        raise FileExistsError(
            f"output_dir {output_dir} already holds a run ({', '.join(held)}): {resuming}choose another output_dir, or "
            "delete it with overwrite_output_dir=true."
        )
    return None


def is_started_again(output_dir: Path, ranks: Ranks) -> bool:
    """Whether torchrun has started the processes again, and the run in `output_dir` is what they were at.

    All ranks ask: after a machine was lost and another came, only some were there before.
    """
    starts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "KDTUNE_RESTARTED"))
    if not ranks.any(any(int(count) > 0 for count in starts)):
        return False
    mark = output_dir / _MARK
    return mark.is_file() and json.loads(mark.read_text()).get("launch") == os.environ["TORCHELASTIC_RUN_ID"]


def latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = _checkpoints(output_dir)
    return found[-1] if found else None


def check_resume(resume_from: Path | None, loader: Stateful, num_steps: int) -> int:
    """Put the loader where the run stopped, which refuses other data, before models and moments are read.

    Returns:
        Optimizer steps that are done; 0 without a checkpoint.

    Raises:
        ValueError: the checkpoint cannot be read, is of a run with other data, or is behind the end of this one.
    """
    if resume_from is None:
        return 0
    state = _read_state(resume_from, mmap=True)
    loader.load_state_dict(state["loader"])
    if state["step"] > num_steps:
        raise ValueError(
            f"{resume_from} was saved after step {state['step']}, and this run ends after step {num_steps}. Its model "
            "would be that of a longer run: raise max_steps or epochs, or choose another output_dir."
        )
    return state["step"]


class Run:
    """The state of a training run: where it stands, and how it gets to the disk and back.

    with run:  # at its end nothing is still being written, whatever ended it
        for run.step in ...:
            ...
            run.save(in_background=True)
    """

    def __init__(self, output_dir: Path, resume_from: Path | None, model: Trained, **parts: Stateful) -> None:
        """Continue from a checkpoint, or start in an output folder cleared of an earlier run.

        Args:
            output_dir: folder of the run.
            resume_from: what `prepare_output_dir` returned.
            model: what is trained, by processes that all call this object's methods.
            parts: whatever has to continue with its state, such as the optimizer.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
        self.output_dir = output_dir
        self.step = 0  # optimizer steps done
        self._model = model
        self._ranks = ranks = model.ranks
        self._parts = parts
        self._background = Background(ranks)
        if ranks.is_first:
            begin(output_dir, clear=resume_from is None)
        ranks.wait()
        if resume_from is not None:
            state = _read_state(resume_from, mmap=ranks.size > 1)
            _check_parts(resume_from, state, parts)
            for name, part in parts.items():
                part.load_state_dict(state[name] | read_spread(resume_from / name, part, state[name], ranks))
            if ranks.rank < len(state["random"]):  # one that was not there then keeps the numbers it was started with
                _set_random_state(state["random"][ranks.rank])
            self.step = state["step"]
            ranks.wait()
            if ranks.is_first:
                _delete_others(resume_from)

    def save(self, in_background: bool = False) -> Path:
        """Write `checkpoints/step_N` of the present step, then delete the older ones and what a crash left there.

        Args:
            in_background: return as soon as all is copied to the host's memory, and write the copy while training goes
                on. What stops the writing is raised by what next waits for it: another `save`, `finish`, `wait`.

        Raises:
            OSError: the disk is full or not writable. The newest checkpoint is still the one before.
            FloatingPointError: a weight is not a number.
        """
        self.wait()
        folder = self._folder()
        content = {
            "trained": self._model.trained(),
            "state": {name: part.state_dict() for name, part in self._parts.items()}
            | {"step": self.step, "random": _random_state()},
        }
        write = functools.partial(self._write, folder)
        if in_background:
            self._background.start(write, content)
        else:
            write(content, self._ranks)
        return folder

    def wait(self) -> None:
        """Until no checkpoint is being written in the background.

        Raises:
            Exception: as `save`, for the one that was.
        """
        self._background.wait()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if value is None:
            self.wait()
        else:
            self._settle()

    def _settle(self) -> None:
        """Wait, for a run that fails for another reason."""
        try:
            self.wait()
        except Exception as error:
            warnings.warn(str(error), stacklevel=2)

    def _write(self, folder: Path, content: dict[str, Any], ranks: Ranks) -> None:
        def write(aside: Path) -> None:
            self._model.write(aside, content["trained"], ranks)
            state = dict(content["state"])
            for name, part in self._parts.items() if ranks.size > 1 else ():
                if isinstance(part, Spread):
                    state[name] = write_spread(aside / name, part, state[name], ranks)
            state["random"] = ranks.gather(state["random"])
            with ranks.together():
                if ranks.is_first:
                    _write_state(aside / STATE_FILE, state)

        try:
            write_aside(folder, write, ranks)
        except OSError as error:
            newest = latest(self.output_dir)
            kept = f"The newest checkpoint is {newest}" if newest else "No checkpoint was saved before"
            raise OSError(f"{folder} could not be written: {error}. {kept}.") from error
        if ranks.is_first:
            _delete_others(folder)

    def _folder(self) -> Path:
        return self.output_dir / "checkpoints" / f"step_{self.step:08d}"

    def finish(self, write: Callable[[Path], None], name: str = "model") -> Path:
        """Write a result, `model` or `adapter`; a checkpoint from an interruption must not stay older than it."""
        assert name in _FINISHED
        self.wait()
        newest = latest(self.output_dir)
        if newest is not None and newest != self._folder():
            self.save()
        return write_aside(self.output_dir / name, write, self._ranks)

    def record(self, config_yaml: str, recipe: Path) -> None:
        """Leave what reproduces the run beside the versions: the resolved settings and the recipe's source."""
        if self._ranks.is_first:
            record(self.output_dir, config_yaml, recipe)

    def not_finite(self, step: int, loss: float, grad_norm: float, *, applied: bool = False) -> FloatingPointError:
        """The error for a loss or a gradient that is not a number, in a step that is still to be applied or is not."""
        self._settle()
        newest = latest(self.output_dir)
        kept = f"The checkpoint {newest} is from before." if newest else "No checkpoint was saved before."
        fate = "was applied within the backward (optimizer_in_bwd=true)" if applied else "was not applied"
        return FloatingPointError(
            f"The loss of step {step} is {loss}, the norm of its gradient {grad_norm}. The step {fate}, and no later "
            f"step could recover from it. {kept} Usual causes: a learning rate that is too high, a warm-up "
            "that is too short, broken weights."
        )


def begin(output_dir: Path, *, clear: bool = True) -> None:
    """Make the folder of a run, and say whose it is.

    Args:
        output_dir: as `prepare_output_dir` found it.
        clear: delete what an earlier run wrote there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if clear:
        _clear(output_dir)  # before the mark says whose run this is
    _write_mark(output_dir)


def record(output_dir: Path, config_yaml: str, recipe: Path) -> None:
    """Leave what reproduces a run in its folder: the resolved settings and the recipe's source."""
    (output_dir / "config.yaml").write_text(config_yaml)
    # Not shutil.copyfile, which refuses when the recorded recipe is itself what runs.
    (output_dir / "recipe.py").write_bytes(recipe.read_bytes())


def write_aside(folder: Path, write: Callable[[Path], None], ranks: Ranks = ALONE) -> Path:
    """Fill a folder beside `folder`, flush it to the disk and rename it into place, replacing an older one.

    All ranks call it, and fill it together.

    Raises:
        OSError: the disk is full or not writable; `folder` is then as it was.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    with ranks.together():
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    write(aside)
    ranks.wait()
    with ranks.together():
        if ranks.is_first:
            _put_in_place(aside, folder)
    return folder


def _put_in_place(aside: Path, folder: Path) -> None:
    for path in sorted(aside.rglob("*")):
        files.sync(path)
    files.sync(aside)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    files.sync(folder.parent)
    files.sync(folder.parent.parent)  # which may have got a new folder, too
    shutil.rmtree(replaced, ignore_errors=True)


def _read_state(folder: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # Without torch's own words, which advise to let the file run code.
        raise ValueError(
            f"{folder / STATE_FILE} cannot be read ({type(error).__name__}). Delete {folder} to resume from "
            "an older checkpoint if there is one, or start again with overwrite_output_dir=true."
        ) from error


def _check_parts(folder: Path, state: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
    saved = state.keys() - {"step", "random"}
    for name in sorted(saved ^ parts.keys()):
        raise ValueError(
            f"{folder} was saved {'with' if name in saved else 'without'} {name}, and this run would go on "
            f"{'without' if name in saved else 'with'} it. A run goes on with the settings that it began with: restore "
            "them, or begin another run in another output_dir."
        )


def _write_state(file: Path, state: dict[str, Any]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # of a disk that is full (torch 2.13)
        raise OSError(f"{file}: {error}") from error


def _write_mark(output_dir: Path) -> None:
    """Say what runs here; in one piece, for a process that is started again reads it."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    versions = {"kdtune": __version__, "torch": torch.__version__, "python": platform.python_version()}
    text = json.dumps(versions | ({"launch": launch} if launch else {}), indent=2) + "\n"
    files.write(output_dir / _MARK, text.encode())


def _clear(output_dir: Path) -> None:
    """Delete what an earlier run wrote there, and nothing else."""
    for path in (output_dir / name for name in _RESULTS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    folders = [p for p in (output_dir / "checkpoints").glob("step_*") if _FOLDER.fullmatch(p.name)]
    return sorted((p for p in folders if (p / STATE_FILE).is_file()), key=lambda p: int(p.name.removeprefix("step_")))


def _delete_others(newest: Path) -> None:
    """Delete what lies beside the newest checkpoint: older ones, and what a crash left."""
    for folder in sorted(newest.parent.iterdir()):
        if folder != newest and _FOLDER.fullmatch(folder.name.lstrip(".").partition(".")[0]):
            # Under a hidden name, so that a crash leaves no half of a checkpoint that looks like a whole one.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name.lstrip('.')}")))


def _random_state() -> dict[str, Any]:
    accelerator = torch.get_device_module().get_rng_state() if torch.accelerator.is_available() else None
    return {"cpu": torch.get_rng_state(), "accelerator": accelerator}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["accelerator"] is not None and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])
