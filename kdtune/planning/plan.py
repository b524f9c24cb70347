"""A training step without data: the recipe's own, on tensors that have a shape and no bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdtune import data, devices
from kdtune.distributed import Ranks
from kdtune.documents import Documents
from kdtune.memory import format_bytes
from kdtune.planning.stand_ins import without_data
from kdtune.planning.tracker import LOSS, OPTIMIZER, PARTS, STUDENT, TEACHER, TEMPORARY, Peak, Tracker


@dataclass(frozen=True)
class Plan:
    """What an optimizer step takes in which every row has its full length, and every position a label.

    Attributes:
        device: the peak where the student is.
        host: the peak of the host's memory beside a GPU, for what is offloaded; empty on the CPU.
        flops: operations of its matrix products, by `student` and `teacher`, which are their bodies, and `heads`.
        floor: the least of these that there can be: without attention, and nothing computed twice.
        num_tokens: labelled positions.
        num_micro_batches: of the step.
        formats: the operations again, by the number format of the products: bf16, tf32, fp32, int8 or fp8.
    """

    device: Peak
    host: Peak
    flops: dict[str, float]
    floor: float
    num_tokens: int
    num_micro_batches: int
    formats: dict[str, float]

    def __str__(self) -> str:
        listed = ", ".join(f"{part} {format_bytes(self.device.parts[part])}" for part in shown(self.device))
        text = f"{format_bytes(self.device.total)} ({listed})"
        return text + f", and {format_bytes(self.host.total)} of the host" * (self.host.total > 2**20)


def describe(cfg: Any, build: Callable[..., Any], forward_backward: Callable[..., Any], ranks: Ranks) -> str:
    """The plan in words, for a run on the device of `ranks`, with a warning if it is more than this has.

    A recipe whose step cannot be run without data is run nevertheless.
    """
    try:
        planned = plan(cfg, build, forward_backward)
    except Exception as error:
        return f"not known, as this recipe's step cannot be run without data ({type(error).__name__}: {error})"
    text = f"about {planned} when every row has {cfg.tokenizer.max_seq_len:,} tokens"
    if ranks.size > 1:
        return f"{text}, in a process that is alone; these hold weights, gradients and moments together"
    there = devices.memory(ranks.device)
    if planned.device.total > there:
        text += f"\nWARNING: {ranks.device} has {format_bytes(there)}. `kdtune plan` with --budget says what to change."
    return text


def shown(peak: Peak) -> list[str]:
    """The parts of a peak that are worth a word."""
    return [part for part in PARTS if peak.parts.get(part, 0) > peak.total / 500]


def plan(
    cfg: Any,
    build: Callable[..., Any],
    forward_backward: Callable[..., Any],
    check_settings: Callable[..., None] | None = None,
) -> Plan:
    """Run a recipe's optimizer step without data, and see what it takes.

    Args:
        cfg: the recipe's settings. Of the files that they name, each model's `config.json` is opened and no other.
        build: the recipe's, from settings and a device to models and, last, the optimizer.
        forward_backward: the recipe's, from settings, models, micro-batches and their number of labels to gradients.
        check_settings: the recipe's, from settings and a device; None: it has been asked.

    Raises:
        FileNotFoundError, ValueError: as `build` and `check_settings`.
    """
    device = devices.for_plan(cfg.device)
    if check_settings is not None:
        check_settings(cfg, device)
    if device.type != "cpu":
        with suppress(Exception):  # what is wrong is found again
            return _plan(cfg, build, forward_backward, device, host=False)
    return _plan(cfg, build, forward_backward, device, host=True)


def _plan(
    cfg: Any, build: Callable[..., Any], forward_backward: Callable[..., Any], device: torch.device, host: bool
) -> Plan:
    traced = min(cfg.gradient_accumulation_steps, 2)  # a third finds what the second found
    with without_data(host) as (compute, shares), Tracker(compute) as tracker:
        *built, optimizer = build(cfg, Ranks(device))
        models = _by_role(built)
        micro_batches = [_full_batch(cfg) for _ in range(traced)]
        num_tokens = sum(batch.labels.numel() for batch in micro_batches)
        with tracker.following(models):
            _first_step(models[STUDENT], optimizer)
            tracker.assign(_tensors(optimizer.state), OPTIMIZER)
            tracker.restart()
            with tracker.during("loss", LOSS):
                forward_backward(cfg, *built, micro_batches, num_tokens)
            with tracker.during("optimizer's step", TEMPORARY):
                optimizer.step()
    scale = cfg.gradient_accumulation_steps / traced
    scale_of = defaultdict(lambda: scale, {"heads": scale * (len(shares) / sum(shares) if shares else 1)})
    flops: dict[str, float] = defaultdict(float)
    formats: dict[str, float] = defaultdict(float)
    for (part, dtype), count in tracker.flops.items():
        flops[part] += scale_of[part] * count
        formats[_FORMATS.get(dtype) or _OF_FLOAT32[cfg.matmul_precision]] += scale_of[part] * count
    peaks = {place.type: peak for place, peak in tracker.peaks.items()}
    return Plan(
        device=peaks[device.type],
        host=peaks.get("cpu", Peak()) if device.type != "cpu" else Peak(),
        flops=dict(flops),
        floor=_floor(models) * num_tokens * scale,
        num_tokens=int(num_tokens * scale),
        num_micro_batches=cfg.gradient_accumulation_steps,
        formats=dict(formats),
    )


_FORMATS = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
_OF_FLOAT32 = {"highest": "fp32", "high": "tf32", "medium": "bf16"}


def _by_role(built: Iterable[Any]) -> dict[str, list[nn.Module]]:
    """The models among what was built, or one step inside of it; what is trained is a student."""
    models: dict[str, list[nn.Module]] = {STUDENT: [], TEACHER: []}
    for one in built:
        for model in [one] if isinstance(one, nn.Module) else vars(one).values():
            if isinstance(model, nn.Module):
                is_trained = any(parameter.requires_grad for parameter in model.parameters())
                models[STUDENT if is_trained else TEACHER].append(model)
    return models


def _full_batch(cfg: Any) -> data.Batch:
    """Rows of one document each, which is the most that attention can be asked for."""
    b, s = cfg.batch_size, cfg.tokenizer.max_seq_len
    tokens = torch.zeros(b, s, dtype=torch.int64)
    documents = Documents.in_rows([[s]] * b) if cfg.dataset.packed else None
    return data.Batch(tokens, tokens.clone(), torch.arange(s).expand(b, s), documents)


def _first_step(students: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """The one in which an optimizer makes its state."""
    for student in students:
        for parameter in student.parameters():
            if parameter.requires_grad:
                # In what its gradients add up, which need not be its own format.
                parameter.grad = torch.empty_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _floor(models: Mapping[str, Sequence[nn.Module]]) -> float:
    """Operations for a labelled token: a product forward; two more for the gradients of input and weight."""
    total = 0
    for role, roots in models.items():
        # A head that stands by itself is that of a model, or a copy of it.
        modules = {module for root in roots if not isinstance(root, nn.Linear) for module in root.modules()}
        for module in modules:
            if isinstance(module, nn.Linear):
                products = 1 if role == TEACHER else 2 + module.weight.requires_grad
                total += 2 * products * module.weight.numel()
    return total


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)
