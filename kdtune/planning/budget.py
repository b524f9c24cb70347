"""Which settings to change so that a plan fits, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kdtune.planning.accelerators import fits
from kdtune.planning.plan import Plan

_ENOUGH_TOKENS = 4096  # in a micro-batch: matrices of so many rows still run at full speed on a GPU
_WORTH_IT = 0.99  # of the peak before; what leaves more is not proposed


@dataclass(frozen=True)
class Change:
    """Settings that are changed together.

    Attributes:
        settings: their new values by key, as they are written.
        price: what is given for the memory.
    """

    settings: Mapping[str, str]
    price: str


PlanWith = Callable[[Sequence[Change]], Plan]


def changes_to_fit(cfg: Any, plan: Plan, memory_gb: float, plan_with: PlanWith) -> tuple[list[Change], Plan]:
    """Changes after which the plan fits a GPU of this size, and the plan; all that help if they are not enough.

    They are made in the order of their price until the plan fits. Then those are taken back that turn out not to be
    needed, the dearest first.

    Args:
        cfg: the settings of the plan.
        plan: without a change.
        memory_gb: size of the GPU.
        plan_with: the plan after these changes; ValueError if they exclude each other, or the recipe has no such
            setting.
    """
    made: list[Change] = []
    for change in _possible(cfg):
        if fits(plan, memory_gb):
            break
        more = [*(one for one in made if not one.settings.keys() <= change.settings.keys()), change]
        with suppress(ValueError):
            changed = plan_with(more)
            if changed.device.total < _WORTH_IT * plan.device.total:
                made, plan = more, changed
    if not fits(plan, memory_gb):
        return made, plan
    for change in made[-2::-1]:
        fewer = [one for one in made if one is not change]
        with suppress(ValueError):
            changed = plan_with(fewer)
            if fits(changed, memory_gb):
                made, plan = fewer, changed
    return made, plan


def _possible(cfg: Any) -> Iterator[Change]:
    """In the order of their price; a later one may set a key again."""
    smaller = list(_smaller_batches(cfg))
    for settings, num_tokens in smaller:
        if num_tokens >= _ENOUGH_TOKENS:
            yield Change(settings, "the same step in more pieces")
    yield from _layouts(cfg)
    yield Change({"loss_chunk_size": "256"}, "the loss in smaller products")
    checkpointing = {"enable_activation_checkpointing": "true"}
    if not cfg.enable_activation_checkpointing:
        price = "norms and activation functions are computed twice"
        yield Change({**checkpointing, "activation_checkpointing_mode": "selective"}, price)
    full = {**checkpointing, "activation_checkpointing_mode": "full"}
    yield Change(full, "the student's forward is computed twice")
    few_bits = {"optimizer.name": "adamw_8bit"}
    may_round = cfg.dtype == "bf16" and cfg.optimizer.precision in (None, "fp32")
    if may_round:
        few_bits["optimizer.precision"] = "fp32"  # by itself it would round the weights
    yield Change(few_bits, "moments in 8 bits")
    if may_round:
        yield Change({**few_bits, "optimizer.precision": "stochastic"}, "moments in 8 bits, weights rounded by chance")
    yield Change({"teacher.quantization": "int8"}, "the teacher is rounded to 8 bits")
    for settings, num_tokens in smaller:
        if num_tokens < _ENOUGH_TOKENS:
            yield Change(settings, "the same step in pieces too small for full speed")
    yield Change({**full, "enable_activation_offloading": "true"}, "activations wait in the host's memory")
    whole_batch = {"batch_size": str(cfg.batch_size), "gradient_accumulation_steps": "1"}
    if cfg.gradient_accumulation_steps == 1:
        in_backward = {"optimizer_in_bwd": "true", "clip_grad_norm": "null"}
        yield Change({**whole_batch, **in_backward}, "the gradient is not clipped")
    yield Change({"teacher.offload": "true"}, "the teacher's layers come from the host's memory")
    offload = {"optimizer.name": "adamw", "optimizer.offload": "true"}
    yield Change(offload, "the optimizer computes on the host")
    parts = {"parallel.offload": "true", "optimizer.name": "adamw", "optimizer.offload": "false"}
    yield Change(parts, "weights come from the host's memory, and the optimizer computes there")
    yield Change({"teacher.quantization": "nf4"}, "the teacher is rounded to 4 bits")
    if getattr(cfg, "lora", None) is None:
        adapter = {"lora.rank": "16", "optimizer.precision": "null"}  # which is in float32
        yield Change(adapter, "an adapter is trained instead of the weights")
    yield Change({"lora.base_quantization": "nf4"}, "the weights beside the adapter are rounded to 4 bits")


def _layouts(cfg: Any) -> Iterator[Change]:
    """Ways in which the same processes hold less each, and send more. The rows of a step stay as they are."""
    parallel = cfg.parallel
    if not parallel.reshard_after_forward:
        again = {"parallel.reshard_after_forward": "true"}
        yield Change(again, "the student's weights are gathered again for the backward")
    whole = {"parallel.data_replicate": "1", "parallel.data_shard": "null"}
    if parallel.data_replicate > 1:
        yield Change(whole, "weights are gathered from all processes")
    if getattr(cfg, "teacher_parallel", None) is not None:
        yield Change(
            {**whole, "teacher_parallel": "null"}, "the teacher's weights are gathered from all processes, too"
        )


def _smaller_batches(cfg: Any) -> Iterator[tuple[dict[str, str], int]]:
    """Settings that split a step further, and the tokens of their micro-batches."""
    batch_size, steps = cfg.batch_size, cfg.gradient_accumulation_steps
    while batch_size % 2 == 0:
        batch_size, steps = batch_size // 2, steps * 2
        settings = {"batch_size": str(batch_size), "gradient_accumulation_steps": str(steps)}
        yield settings, batch_size * cfg.tokenizer.max_seq_len
