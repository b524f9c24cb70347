"""A training step without data: the recipe's own, on tensors that have a shape and no bytes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from kdtune import data, devices
from kdtune.distributed import Ranks, arrange, check_layout
from kdtune.documents import Documents
from kdtune.memory import format_bytes
from kdtune.planning.processes import one_of, spread_without_data, tensors
from kdtune.planning.stand_ins import without_data
from kdtune.planning.tracker import (
    GATHERED,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    PARTS,
    STUDENT,
    TEACHER,
    TEMPORARY,
    Peak,
    Tracker,
)
from kdtune.preflight import check_spread


class Message(NamedTuple):
    """What is sent to other processes.

    Attributes:
        kind: the collective, such as `all-gather`.
        part: `weights`, `gradients`, `loss` or `activations`.
        size: how many processes take part.
        nodes: on how many nodes they are.
    """

    kind: str
    part: str
    size: int
    nodes: int


@dataclass(frozen=True)
class Plan:
    """What an optimizer step takes of one process, if every row has its full length and every position a label.

    Attributes:
        device: the peak where the student is.
        host: the peak of the host's memory beside a GPU, for what is offloaded; empty on the CPU.
        flops: operations of its matrix products, by `student` and `teacher`, which are their bodies, and `heads`.
        floor: the least of these that there can be: without attention, and nothing computed twice.
        num_tokens: labelled positions of its rows, of which it may have a slice.
        num_micro_batches: of the step.
        formats: the operations again, by the number format of the products: bf16, tf32, fp32, int8 or fp8.
        sent: bytes to other processes. As many come from them.
        rank: of the process.
        layout: degree of each dimension of the mesh of processes; empty if this one is alone.
        num_data_ranks: how many processes, or groups that share rows, have as many of their own.
    """

    device: Peak
    host: Peak
    flops: dict[str, float]
    floor: float
    num_tokens: int
    num_micro_batches: int
    formats: dict[str, float]
    sent: dict[Message, float]
    rank: int
    layout: dict[str, int]
    num_data_ranks: int

    def __str__(self) -> str:
        listed = ", ".join(f"{part} {format_bytes(self.device.parts[part])}" for part in shown(self.device))
        text = f"{format_bytes(self.device.total)} ({listed})"
        return text + f", and {format_bytes(self.host.total)} of the host" * (self.host.total > 2**20)


def describe(cfg: Any, build: Callable[..., Any], forward_backward: Callable[..., Any], ranks: Ranks) -> str:
    """The plan in words, for a run on the device of `ranks`, with a warning if it is more than this has.

    A recipe whose step cannot be run without data is run nevertheless.
    """
    try:
        planned = plan(cfg, build, forward_backward, ranks=ranks)
    except Exception as error:
        return f"not known, as this recipe's step cannot be run without data ({type(error).__name__}: {error})"
    each = " in this process" * (ranks.size > 1)
    text = f"about {planned}{each} when every row has {cfg.tokenizer.max_seq_len:,} tokens"
    there = devices.memory(ranks.device)
    if planned.device.total > there:
        text += f"\nWARNING: {ranks.device} has {format_bytes(there)}. `kdtune plan` with --budget says what to change."
    here, free = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), devices.free_host_memory()
    if planned.host.total * here > free:
        text += f"\nWARNING: that is {format_bytes(planned.host.total * here)} of this machine's own memory"
        text += f" for {here} processes" * (here > 1) + f", and {format_bytes(free)} are free."
    return text


def shown(peak: Peak) -> list[str]:
    """The parts of a peak that are worth a word."""
    return [part for part in PARTS if peak.parts.get(part, 0) > peak.total / 500]


def plan(
    cfg: Any,
    build: Callable[..., Any],
    forward_backward: Callable[..., Any],
    check_settings: Callable[..., None] | None = None,
    *,
    per_node: int = 1,
    nodes: int = 1,
    ranks: Ranks | None = None,
) -> Plan:
    """Run a recipe's optimizer step without data, and see what it takes.

    Args:
        cfg: the recipe's settings. Of the files that they name, each model's `config.json` is opened and no other.
        build: the recipe's, from settings and a device to models and, last, the optimizer.
        forward_backward: the recipe's, from settings, models, micro-batches and their number of labels to gradients.
        check_settings: the recipe's, from settings and a device; None: it has been asked.
        per_node: processes on a node. The plan is of that which holds most.
        nodes: how many of these there are.
        ranks: the processes, if they are running; then the plan is of this one.

    Raises:
        FileNotFoundError, ValueError: as `build`, `check_settings`, `check_layout` and `check_spread`.
    """
    device, size = devices.for_plan(cfg.device), nodes * per_node
    plans = []
    # All but the stages of a pipeline are alike. The first has most micro-batches under way, the last has the heads.
    stages = cfg.parallel.pipeline if size > 1 and ranks is None else 1
    for rank in (0, size - size // stages) if stages > 1 else (0,):
        with ExitStack() as stack:
            if ranks is None and size > 1:
                stack.enter_context(one_of(size, rank))
            own = arrange(cfg.parallel, device) if size > 1 else replace(ranks or Ranks(device), device=device)
            if check_settings is not None:
                if hasattr(cfg, "parallel"):
                    check_layout(cfg.parallel, own.size)
                    check_spread(cfg, own)
                check_settings(cfg, device)
            plans.append(_plan(cfg, build, forward_backward, own, per_node))
    return max(plans, key=lambda plan: plan.device.total)


def _plan(
    cfg: Any, build: Callable[..., Any], forward_backward: Callable[..., Any], ranks: Ranks, per_node: int
) -> Plan:
    if ranks.device.type != "cpu":
        with suppress(Exception):  # what is wrong is found again
            return _run(cfg, build, forward_backward, ranks, per_node, host=False)
    return _run(cfg, build, forward_backward, ranks, per_node, host=True)


def _run(
    cfg: Any,
    build: Callable[..., Any],
    forward_backward: Callable[..., Any],
    ranks: Ranks,
    per_node: int,
    host: bool,
) -> Plan:
    layout = {} if ranks.mesh is None else dict(zip(ranks.mesh.mesh_dim_names or (), ranks.mesh.shape, strict=True))
    # One more than are under way at a time: it finds what those find that follow.
    traced = min(cfg.gradient_accumulation_steps, layout.get("pipeline", 1) + 1)
    spread = nullcontext() if ranks.mesh is None else spread_without_data(ranks.device)
    with spread, without_data(host) as (compute, shares), Tracker(compute) as tracker:
        *built, optimizer = build(cfg, ranks)
        models = _by_role(built)
        for root in (root for roots in models.values() for root in roots):
            if state := getattr(root, "_get_fsdp_state", None):
                state()._lazy_init()  # which moves what is to stay in host memory, and no first forward has come by
        rows = [_full_batch(cfg) for _ in range(traced)]
        num_tokens = sum(batch.labels.numel() for batch in rows)
        micro_batches = [ranks.share.of(batch) for batch in rows]
        if not ranks.share.is_scored:  # which is not seen in labels without data
            micro_batches = [replace(batch, scored=torch.empty(0, dtype=torch.int64)) for batch in micro_batches]
        with tracker.following(models):
            _first_step(models, optimizer)
            tracker.assign(tensors(optimizer.state), OPTIMIZER)
            tracker.restart()
            with tracker.during("loss", LOSS):
                forward_backward(cfg, *built, micro_batches, num_tokens)
            with tracker.during("optimizer's step", TEMPORARY):
                optimizer.step()
    scale = cfg.gradient_accumulation_steps / traced
    of_heads = scale * (len(shares) / sum(shares) if shares else 1)
    flops: dict[str, float] = defaultdict(float)
    formats: dict[str, float] = defaultdict(float)
    for (work, dtype), count in tracker.flops.items():
        count *= of_heads if work == "heads" else scale
        flops[work] += count
        formats[_FORMATS.get(dtype) or _OF_FLOAT32[cfg.matmul_precision]] += count
    sent: dict[Message, float] = defaultdict(float)
    for (kind, part, group), num_bytes in tracker.sent.items():
        nodes = len({rank // per_node for rank in group})
        # Gradients are sent once, after the last micro-batch.
        if part == LOSS and kind in ("send", "receive"):  # beside a pipeline's layers nothing but a tied weight's
            part = GRADIENTS
        times = {GRADIENTS: 1.0, LOSS: of_heads}.get(part, scale)
        sent[Message(kind, _SENT.get(part, "activations"), len(group), nodes)] += times * num_bytes
    peaks = {place.type: peak for place, peak in tracker.peaks.items()}
    return Plan(
        device=peaks[ranks.device.type],
        host=peaks.get("cpu", Peak()) if ranks.device.type != "cpu" else Peak(),
        flops=dict(flops),
        floor=_floor(models) * num_tokens * scale / (layout.get("context", 1) * layout.get("tensor", 1)),
        num_tokens=int(num_tokens * scale),
        num_micro_batches=cfg.gradient_accumulation_steps,
        formats=dict(formats),
        sent=dict(sent),
        rank=ranks.rank,
        layout=layout,
        num_data_ranks=ranks.share.num_ranks,
    )


_FORMATS = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
_SENT = {GATHERED: "weights", GRADIENTS: "gradients", LOSS: "loss"}
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


def _first_step(models: Mapping[str, Sequence[nn.Module]], optimizer: torch.optim.Optimizer) -> None:
    """The one in which an optimizer makes its state, and after which a spread teacher keeps its head."""
    for teacher in models[TEACHER]:
        if unshard := getattr(teacher, "unshard", None):
            unshard()
    for student in models[STUDENT]:
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
