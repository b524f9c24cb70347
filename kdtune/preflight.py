"""Checks across models, tokenizers and machine that need no weights, so that a mistake costs seconds and not hours."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdtune import checkpoint, devices, distributed, memory, optim, tokenizers
from kdtune.distributed import ParallelConfig, Ranks
from kdtune.memory import format_bytes
from kdtune.models import (
    LoraConfig,
    ModelConfig,
    check_checkpointing,
    check_qat,
    num_parameters,
    trained_shapes,
)
from kdtune.tokenizers import Tokenizer


def check_training(cfg: Any, device: torch.device, model: ModelConfig) -> None:
    """Refuse settings about how weights are trained that exclude each other, or change nothing here.

    Args:
        cfg: a recipe's settings.
        device: where the model is; `meta` is any GPU.
        model: the architecture of what is trained.

    Raises:
        ValueError: says which, why and what to do.
    """
    check_checkpointing(
        cfg.enable_activation_checkpointing,
        cfg.activation_checkpointing_mode,
        cfg.enable_activation_offloading,
        device,
    )
    dtype = devices.DTYPES[cfg.dtype]
    has_adapter = cfg.lora is not None
    optim.check_optimizer(
        cfg.optimizer,
        dtype=torch.float32 if has_adapter and not cfg.lora.modules_to_save else dtype,
        device=device,
        in_backward=cfg.optimizer_in_bwd,
        clip_grad_norm=cfg.clip_grad_norm,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
    )
    if cfg.qat is not None:
        check_qat(cfg.qat, model, has_adapter=has_adapter, dtype=cfg.dtype, save_dtype=cfg.save_dtype)
    if has_adapter:
        checkpoint.check_lora(cfg.lora, cfg.checkpointer, model, dtype, device, merged_dtype=cfg.save_dtype)


def check_spread(cfg: Any, ranks: Ranks) -> None:
    """Refuse what a model that several processes hold together does not do.

    Args:
        cfg: a recipe's settings.
        ranks: the processes.

    Raises:
        ValueError: says which setting, why and what to do.
    """
    teacher: Any = getattr(cfg, "teacher", None)
    teacher_parallel = getattr(cfg, "teacher_parallel", None) or cfg.parallel
    section = "teacher_parallel" if hasattr(cfg, "teacher_parallel") else "parallel"
    distributed.check_layout(teacher_parallel, ranks.size, section)
    moving = [f"{one}.offload" for one in ("teacher", "optimizer") if hasattr(cfg, one)]
    check_offloading(cfg.parallel, ranks, "parallel", moving)
    if teacher_parallel is not cfg.parallel:
        check_without_backward(teacher_parallel, "teacher_parallel")
        check_offloading(teacher_parallel, ranks, "teacher_parallel", moving[:1])
    if ranks.size == 1:
        return
    is_cut = teacher is not None and distributed.is_shared(teacher_parallel, ranks.size)
    whole = f"Give each process a whole teacher: {section}.data_replicate={ranks.size} and data_shard=1"
    for name in ("pipeline", "context", "tensor"):
        if getattr(cfg.parallel, name) > 1:  # which the teacher has to have too
            whole = f"Leave it out, or parallel.{name}"
    for setting, is_set, why, cure in (
        ("teacher.quantization", is_cut and teacher.quantization, "weights of few bits are not cut", whole),
        ("teacher.offload", is_cut and teacher.offload, "layers are gathered from other processes instead", whole),
        ("teacher.device", teacher and teacher.device, "each process has one device", "Leave it out"),
    ):
        if is_set:
            raise ValueError(f"{setting} does not go with {ranks.size} processes: {why}. {cure}.")
    for name, why in (
        ("pipeline", "both heads have to be on the last stage, where the loss is"),
        ("context", "hidden states of the same positions have to meet"),
        ("tensor", "both heads are cut at the same entries of the vocabulary"),
    ):
        degree, of_teacher = getattr(cfg.parallel, name), getattr(teacher_parallel, name)
        if of_teacher != degree:
            raise ValueError(
                f"teacher_parallel.{name}={of_teacher} and parallel.{name}={degree}: {why}. Give "
                f"teacher_parallel.{name}={degree}."
            )
    if not hasattr(cfg, "optimizer"):
        return  # what follows is about training
    few_bits = cfg.lora is not None and cfg.lora.base_quantization
    for setting, is_set, why in (
        ("optimizer.offload", cfg.optimizer.offload, "it has moved the optimizer's state to the host as well"),
        ("lora.base_quantization", few_bits, "weights of few bits are not cut, and all that is trained is small"),
    ):
        if cfg.parallel.offload and is_set:
            raise ValueError(f"{setting} does not go with parallel.offload=true: {why}. Leave one of them out.")
    degree = cfg.parallel.tensor
    for setting, names, why in (
        ("lora", ("pipeline", "tensor"), "an adapter is made beside whole layers"),
        ("qat", ("pipeline", "tensor"), "what is rounded, and written so, are whole layers"),
        ("hidden_loss", ("pipeline",), "the layers that are compared would be in other processes than the loss"),
        ("optimizer_in_bwd", ("pipeline",), "a step has one micro-batch, and a pipeline is for several"),
    ):
        for name in names:
            if getattr(cfg, setting, None) and (of_layers := getattr(cfg.parallel, name)) > 1:
                raise ValueError(
                    f"{setting} does not go with parallel.{name}={of_layers}: {why}. Take parallel.data_shard instead, "
                    "which gathers whole layers while they compute."
                )
    sorts = hasattr(cfg, "kd_loss") and cfg.kd_loss.name == "adaptive_kl"
    if degree > 1 and sorts and teacher.cache_dir is None:  # a top k is not cut
        raise ValueError(
            f"kd_loss.name=adaptive_kl does not go with parallel.tensor={degree}: it sorts whole distributions, of "
            "which each process has a part. Take another divergence, or parallel.data_shard instead."
        )


def check_without_backward(cfg: ParallelConfig, section: str) -> None:
    """Refuse a setting about the backward for a model that has none.

    Args:
        cfg: how it is spread.
        section: of the settings, to name them.

    Raises:
        ValueError: says which.
    """
    if not cfg.reshard_after_forward:
        raise ValueError(
            f"{section}.reshard_after_forward=false keeps a layer's weights for its backward, and this model has none. "
            "Leave it out."
        )


def check_offloading(cfg: ParallelConfig, ranks: Ranks, section: str, alone: Sequence[str] = ()) -> None:
    """Refuse to keep in host memory what is there, or what is nobody's part.

    Args:
        cfg: how a model is spread.
        ranks: the processes.
        section: of the settings, to name them.
        alone: settings that move something to the host in one process.

    Raises:
        ValueError: says why, and what to take instead.
    """
    if not cfg.offload:
        return
    setting = f"{section}.offload=true keeps each process's part of a model in host memory"
    if ranks.device.type == "cpu":
        raise ValueError(f"{setting}, and on the CPU it is there. Leave it out.")
    if ranks.size == 1:
        instead = " and ".join(f"{one}=true" for one in alone)
        raise ValueError(
            f"{setting}, and one process has no part: it needs all of the model on the GPU. "
            + (f"Take {instead}, or start more processes." if alone else "Leave it out, or start more processes.")
        )
    _, _, shard, context, _ = distributed.check_layout(cfg, ranks.size, section)
    if shard * context == 1:
        raise ValueError(
            f"{setting}, and with {section}.data_shard=1 each has all of its layers, which would be in that memory "
            f"once for each of them. Take {section}.data_shard for some of the processes, or leave it out."
        )


def check_split(cfg: ParallelConfig, model: ModelConfig, role: str) -> None:
    """Refuse a model of which not every process of a group that splits it, or its rows, would have its share.

    Args:
        cfg: how they are to be split.
        model: the architecture.
        role: student, teacher or model, to name it.

    Raises:
        ValueError: says what does not divide, or is too little.
    """
    if cfg.pipeline > model.num_layers:
        raise ValueError(
            f"parallel.pipeline={cfg.pipeline} gives each process some layers, and the {role} has {model.num_layers}. "
            "Take fewer stages, and parallel.data_shard for more processes."
        )
    degree = cfg.tensor
    for what, size in (("key heads", model.num_kv_heads), ("columns of its MLP", model.intermediate_size)):
        if size % degree:
            raise ValueError(
                f"parallel.tensor={degree} gives each process as many heads and columns of each layer, and the {role} "
                f"has {size} {what}. Take a divisor of that, and parallel.data_shard for more processes."
            )
    context, heads, key_heads = cfg.context, model.num_heads // degree, model.num_kv_heads // degree
    if heads % context or (key_heads % context and context % key_heads):
        raise ValueError(
            f"parallel.context={context} gives each process as many heads of whole rows, and the {role} has {heads} "
            f"heads and {key_heads} key heads" + f" for each of parallel.tensor={degree}" * (degree > 1) + ". Take a "
            "divisor of the heads that divides the key heads too, or is a multiple of them."
        )


def check_sequence_length(length: int, setting: str, model: ModelConfig, role: str) -> None:
    """Refuse rows longer than what `model` was built for.

    Args:
        length: tokens of the longest row.
        setting: where that length comes from, to name it.
        model: the architecture.
        role: student, teacher or model, to name it.

    Raises:
        ValueError: gives both numbers.
    """
    if length > model.max_seq_len:
        raise ValueError(
            f"{setting} is {length}, and the {role} was built for {model.max_seq_len} positions "
            f"(max_position_embeddings). Beyond them its predictions mean nothing: use at most {model.max_seq_len}."
        )


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, setting: str, model: ModelConfig, role: str
) -> None:
    """Refuse prompts that `model` cannot continue.

    Args:
        prompts: the ids of each.
        max_new_tokens: how far they are continued.
        setting: where they come from, to name it.
        model: the architecture.
        role: student, teacher or model, to name it.

    Raises:
        ValueError: a prompt without tokens, with ids that the model does not have, or that is too long.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(
                f"{setting}: prompt {number} is empty, and the tokenizer puts no token before a text: there is nothing "
                "to continue. Write at least a word."
            )
        if max(prompt) >= model.vocab_size:
            raise ValueError(
                f"{setting}: prompt {number} has the id {max(prompt)}, and the {role}'s embedding has "
                f"{model.vocab_size} rows. Leave out the token that the {role} does not have."
            )
        length = len(prompt) + max_new_tokens
        check_sequence_length(length, f"{setting}: prompt {number} with {max_new_tokens} new tokens", model, role)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, role: str) -> None:
    """Refuse a tokenizer that can produce ids for which a model has no embedding.

    Raises:
        ValueError: gives both sizes.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} ids, the {role}'s embedding {vocab_size} rows. "
            f"Some text would have no embedding: use the tokenizer that belongs to the {role}."
        )


def check_pair(tokenizer: Tokenizer, teacher_tokenizer: Tokenizer, vocab_size: int, teacher_vocab_size: int) -> None:
    """Prove that entry i of both distributions means the same token; sizes may differ by padding at the end.

    Args:
        tokenizer: of the student.
        teacher_tokenizer: of the teacher.
        vocab_size: rows of the student's embedding.
        teacher_vocab_size: of the teacher's.

    Raises:
        ValueError: the tokenizers differ (says where), or a vocabulary is smaller than its tokenizer.
    """
    difference = tokenizers.difference(tokenizer, teacher_tokenizer)
    if difference is not None:
        raise ValueError(
            f"Student (vocabulary {vocab_size}) and teacher ({teacher_vocab_size}) do not share a tokenizer: "
            f"{difference}. The loss compares their distributions entry by entry, so entry i must be the same token in "
            "both. Use a teacher and a student of one family."
        )
    check_vocabulary(tokenizer, vocab_size, "student")
    check_vocabulary(teacher_tokenizer, teacher_vocab_size, "teacher")


def check_saving(cfg: Any, ranks: Ranks, model: ModelConfig) -> str:
    """Refuse a run whose checkpoints will not fit on the disk, or in the host's memory on their way there.

    Args:
        cfg: a recipe's settings.
        ranks: the processes.
        model: the architecture of what is trained.

    Returns:
        What they take of memory, in words that continue a line; none unless they are written in the background.

    Raises:
        PermissionError: nothing can be written there.
        ValueError: gives needed and free bytes; or there are no checkpoints to write in the background.
    """
    check_disk_space(Path(cfg.output_dir), memory.disk(cfg, model))
    if not cfg.save_in_background:
        return ""
    if not cfg.save_every_n_steps:
        raise ValueError(
            "save_in_background=true is about the checkpoints of save_every_n_steps, which is 0: there are none but "
            "that of an interruption, which is waited for. Leave it out, or give save_every_n_steps."
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    needed = memory.checkpoint(cfg, model) * here * cfg.parallel.data_replicate // ranks.size
    free = devices.free_host_memory()
    if free < needed:
        raise ValueError(
            f"save_in_background=true keeps a copy of what a checkpoint holds in the host's memory. It takes "
            f"{format_bytes(needed)} on this machine, and {format_bytes(free)} are free. Leave it out: training then "
            "waits until a checkpoint is written."
        )
    return f"; checkpoints are written from a copy, {format_bytes(needed)} of host memory"


def check_disk_space(folder: Path, needed: int, *, has_checkpoints: bool = True) -> None:
    """Refuse a run whose results will not fit.

    Args:
        folder: where they go; need not exist yet.
        needed: bytes.
        has_checkpoints: whether there are any beside the finished model.

    Raises:
        PermissionError: nothing can be written there.
        ValueError: gives needed and free bytes.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {folder}: {existing} is not writable for you. Choose another output_dir.")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"output_dir {folder} will need {format_bytes(needed)} for {'checkpoints and ' * has_checkpoints}the "
            f"finished model, and its disk has {format_bytes(free)} free. Choose another output_dir"
            + (", or keep no checkpoints (save_every_n_steps=0)." if has_checkpoints else ".")
        )


def describe(folder: str, model: ModelConfig) -> str:
    """One line: where from, how large."""
    return (
        f"{folder}: {num_parameters(model) / 1e6:,.1f} M parameters, {model.num_layers} layers of {model.hidden_size}, "
        f"vocabulary {model.vocab_size:,}"
    )


def describe_trained(cfg: Any, model: ModelConfig) -> str:
    """The same of the model that a recipe trains, and a line for each thing that is not simply its weights."""
    lines = [describe(cfg.checkpointer.checkpoint_dir, model)]
    if cfg.lora is not None:
        lines.append(f"lora      {_describe_lora(cfg.lora, model)}")
    if cfg.qat is not None:
        lines.append(f"qat       {cfg.qat}")
    return "\n".join(lines)


def _describe_lora(lora: LoraConfig, model: ModelConfig) -> str:
    """One line: how much of `model` is trained."""
    shapes = trained_shapes(model, lora)
    count = sum(math.prod(shape) for shape in shapes.values())
    layers = sum(name.endswith("lora_A.weight") for name in shapes)
    return (
        f"{count:,} parameters are trained, {count / num_parameters(model):.1%} of the model's: rank {lora.rank} "
        f"beside {layers} of its weights"
    )
