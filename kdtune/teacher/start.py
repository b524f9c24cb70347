"""From the settings of a teacher to what answers: first whatever can be refused without a weight, then the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdtune import checkpoint, devices, distributed, losses, preflight, tokenizers
from kdtune.data import Batch, RunData
from kdtune.distributed import Ranks
from kdtune.models import ModelConfig, check_quantization, from_hf_config
from kdtune.teacher.cached import CachedTeacher
from kdtune.teacher.config import TeacherConfig
from kdtune.teacher.hidden import check_hidden_loss
from kdtune.teacher.live import LiveTeacher
from kdtune.teacher_cache import TOKENIZER, TeacherCache, read_card, teacher_fingerprint
from kdtune.tokenizers import Tokenizer

Teacher = LiveTeacher | CachedTeacher


@dataclass(frozen=True)
class FoundTeacher:
    """What is known of a teacher before a weight is read.

    Attributes:
        folder: of the model or of the cache.
        vocab_size: entries of its distributions.
        tokenizer: its own.
        config: the architecture of a live one.
        cache: the answers of another.
    """

    folder: str
    vocab_size: int
    tokenizer: Tokenizer
    config: ModelConfig | None
    cache: TeacherCache | None

    def __str__(self) -> str:
        if self.config is not None:
            return preflight.describe(self.folder, self.config)
        assert self.cache is not None
        return f"{self.folder}: {self.cache.summary()}"

    def check_rows(self, loaded: RunData) -> None:
        """Refuse rows that a cached teacher was not asked about.

        Raises:
            ValueError: how many there are, and what to do.
        """
        if self.cache is None:
            return
        wanted = {"dataset": getattr(loaded.loader.examples, "ids", None)}
        if loaded.examples_val is not None:
            wanted["dataset_val"] = loaded.examples_val.ids
        for name, ids in wanted.items():
            if ids is not None and len(missing := self.cache.missing(ids)):
                raise ValueError(
                    f"teacher.cache_dir={self.folder} has no answers for {len(missing):,} of the {len(ids):,} examples "
                    f"of {name}. An example is known by its tokens and labels, so tokenizer, chat template, "
                    "max_seq_len and which parts are labelled must be those that it was made with. Run "
                    "cache_teacher_logits with these settings and the same output_dir: it adds what is missing."
                )

    def judge(self, ce: float) -> str:
        """In words, what the teacher's cross-entropy of some text says about its weights.

        A teacher that was loaded wrongly teaches noise, and no loss would show it.

        Args:
            ce: in nats per token.

        Returns:
            The cross-entropy beside that of a uniform guess, and a warning if it is hardly better.
        """
        uniform = math.log(self.vocab_size)
        found = f"ce {ce:.3f} (a uniform guess: {uniform:.3f})"
        # Fresh weights come out a little above or below the guess. Written so that NaN is called out, too.
        if ce < 0.95 * uniform:
            return found
        return (
            f"{found}\nWARNING: the teacher predicts the labels no better than a uniform guess, so a student learns "
            f"noise from it. Is {self.folder} trained, and for this kind of text?"
        )


def teacher_folders(cfg: Any) -> tuple[str | None, ...]:
    """What is read of the teacher, and must not be written to.

    Args:
        cfg: a recipe's settings.
    """
    live = cfg.teacher_checkpointer
    return (cfg.teacher.cache_dir, *((None,) if live is None else (live.checkpoint_dir, live.adapter_dir)))


def find_teacher(cfg: Any) -> FoundTeacher:
    """Look for the teacher that the settings name.

    Args:
        cfg: a recipe's settings: `teacher`, and `teacher_checkpointer` for a live one.

    Raises:
        FileNotFoundError, ValueError: what is missing or damaged; or the cache is of another teacher than that in
            `teacher_checkpointer`.
    """
    if cfg.teacher.cache_dir is None:
        folder = cfg.teacher_checkpointer.checkpoint_dir
        config = from_hf_config(checkpoint.check_model(cfg.teacher_checkpointer))
        return FoundTeacher(folder, config.vocab_size, tokenizers.load(folder), config, None)
    folder = cfg.teacher.cache_dir
    cache = TeacherCache(folder)
    if not len(cache):
        raise ValueError(f"teacher.cache_dir={folder} has no answers yet. Run cache_teacher_logits with it to the end.")
    live = cfg.teacher_checkpointer
    if live is not None and Path(live.checkpoint_dir).is_dir():
        found = teacher_fingerprint(live.checkpoint_dir, live.adapter_dir)
        if found != cache.card.teacher.fingerprint:
            raise ValueError(
                f"teacher.cache_dir={folder} has the answers of another teacher ({cache.card.teacher.name}) than "
                f"teacher_checkpointer.checkpoint_dir={live.checkpoint_dir}, as far as can be told (its weights: "
                f"{cache.card.teacher.fingerprint}; these: {found}). Learn from the answers alone with "
                "teacher_checkpointer=null, or ask this one with cache_teacher_logits."
            )
    if not (cache.folder / TOKENIZER).is_dir():
        raise ValueError(
            f"teacher.cache_dir={folder} has no tokenizer, with which this run's is compared. Copy the files of the "
            f"tokenizer that made its examples into {cache.folder / TOKENIZER}."
        )
    tokenizer = tokenizers.load(cache.folder / TOKENIZER)
    return FoundTeacher(folder, cache.card.vocab_size, tokenizer, None, cache)


def check_teacher(cfg: Any, device: torch.device) -> None:
    """Refuse settings of the teacher that exclude each other, do not go with it, or would change nothing.

    Args:
        cfg: a recipe's settings; of the teacher `config.json` is read, or the card of its cache.
        device: where the student is; `meta` is any GPU.

    Raises:
        FileNotFoundError, ValueError: says what, and what to do.
    """
    teacher: TeacherConfig = cfg.teacher
    if teacher.cache_dir is not None:
        _check_cached(cfg)
        check_hidden_loss(cfg)
        return
    losses.check_targets(cfg.kd_loss, "whole")
    if cfg.teacher_checkpointer is None:
        raise ValueError(
            "no value for teacher_checkpointer.checkpoint_dir. The recipe cannot guess it: give "
            "teacher_checkpointer.checkpoint_dir=<folder of the teacher>, or teacher.cache_dir=<folder of its answers>."
        )
    check_live_teacher(cfg, device)
    check_hidden_loss(cfg)


def check_live_teacher(cfg: Any, device: torch.device) -> None:
    """Refuse settings of a model that exclude each other, do not go with it, or would change nothing.

    Arguments and errors are those of `check_teacher`.
    """
    teacher: TeacherConfig = cfg.teacher
    config = from_hf_config(cfg.teacher_checkpointer.read_config())
    place = teacher.place(device)
    if teacher.quantization is not None:
        dtype = devices.DTYPES[teacher.dtype or cfg.dtype]
        check_quantization(teacher.quantization, config, dtype=dtype, device=place, setting="teacher.quantization")
    elif teacher.compare_quantization:
        raise ValueError(
            "teacher.compare_quantization=true compares the quantised teacher with the full one, and "
            "teacher.quantization is null. Set it, or leave the comparison out."
        )
    if teacher.offload and place.type == "cpu":
        raise ValueError(
            "teacher.offload=true keeps the teacher's layers in the host's memory, and on the CPU they are there. "
            "Leave it out."
        )
    preflight.check_sequence_length(cfg.tokenizer.max_seq_len, "tokenizer.max_seq_len", config, "teacher")
    preflight.check_split(cfg.parallel, config, "teacher")


def _check_cached(cfg: Any) -> None:
    for name in ("dtype", "device", "quantization", "compare_quantization", "offload"):
        if value := getattr(cfg.teacher, name):
            raise ValueError(
                f"teacher.{name}={value} says how a model is held, and with teacher.cache_dir none is: its answers are "
                "read. Leave one of them out."
            )
    if cfg.teacher_parallel is not None:
        raise ValueError(
            "teacher_parallel spreads a model over processes, and with teacher.cache_dir there is none. Leave it out."
        )
    kind = read_card(cfg.teacher.cache_dir).store.kind
    losses.check_targets(cfg.kd_loss, "whole" if kind == "hidden" else kind)
    if kind == "hidden" and cfg.parallel.tensor > 1:
        raise ValueError(
            f"teacher.cache_dir={cfg.teacher.cache_dir} holds hidden states, whose head is not cut into parts as "
            f"parallel.tensor={cfg.parallel.tensor} needs it. Take parallel.data_shard, or a cache of store.kind=top_k."
        )


def load_teacher(cfg: Any, ranks: Ranks, first_batch: Batch | None = None) -> Teacher:
    """The teacher of the settings: its weights, or its answers, for a student that is spread over the same ranks.

    Args:
        cfg: a recipe's settings.
        ranks: the processes.
        first_batch: rows on which `teacher.compare_quantization` shows what quantisation changes; None: it does not.
    """
    if cfg.teacher.cache_dir is None:
        if first_batch is None or not cfg.teacher.compare_quantization:
            return load_live_teacher(cfg, ranks)
        # The head is never quantised, so that hidden states tell it all.
        full_hidden = load_live_teacher(cfg, ranks, as_it_is=True)(first_batch).hidden
        teacher = load_live_teacher(cfg, ranks)
        num_rows = len(first_batch.tokens)
        found = teacher.compare(full_hidden, first_batch, cfg.loss_chunk_size)
        print(f"teacher.quantization={cfg.teacher.quantization} on {num_rows} row{'s' * (num_rows > 1)}: {found}")
        return teacher
    cache = TeacherCache(cfg.teacher.cache_dir)
    head = _head(cache, cfg, ranks) if cache.card.store.kind == "hidden" else None
    return CachedTeacher(cache, device=ranks.device, convention=cfg.kd_loss.top_k_convention, head=head)


def load_live_teacher(cfg: Any, ranks: Ranks, *, as_it_is: bool = False) -> LiveTeacher:
    """The model of the settings. Of a recipe that trains, its head is cut as the student's.

    Args:
        cfg: a recipe's settings.
        ranks: the processes.
        as_it_is: not quantised, and not in the device's memory if it can be elsewhere: beside it may be no room.
    """
    student = getattr(cfg, "checkpointer", None)
    vocab_size = None if student is None else from_hf_config(student.read_config()).vocab_size
    parallel = getattr(cfg, "teacher_parallel", None) or cfg.parallel
    place = cfg.teacher.place(ranks.device)
    offload = place.type != "cpu" if as_it_is else cfg.teacher.offload
    model = checkpoint.load_model(
        cfg.teacher_checkpointer.checkpoint_dir,
        dtype=devices.DTYPES[cfg.teacher.dtype or cfg.dtype],
        device="cpu" if offload else parallel.place(place),
        adapter_dir=cfg.teacher_checkpointer.adapter_dir,
        quantization=None if as_it_is else cfg.teacher.quantization,
        shard=distributed.sharding(ranks, parallel, trains=False, vocab_size=vocab_size),
    )
    return LiveTeacher(model, student_device=ranks.device, offload_to=place if offload else None)


def _head(cache: TeacherCache, cfg: Any, ranks: Ranks) -> nn.Linear:
    weight, stored = cache.head()
    vocab_size, hidden_size = weight.shape
    head = nn.Linear(hidden_size, vocab_size, bias=False, device="meta")
    dtype = devices.DTYPES[cfg.dtype]
    if not ranks.share.is_scored:  # of a pipeline, where the last stage has the loss: zeros, which take no memory
        found = torch.zeros((), dtype=dtype, device=ranks.device).expand(vocab_size, hidden_size)
    elif stored == "bf16":
        found = torch.from_numpy(weight.view(np.int16)).view(torch.bfloat16).to(ranks.device, dtype)
    else:
        found = torch.from_numpy(weight).to(ranks.device, dtype)
    head.weight = nn.Parameter(found, requires_grad=False)
    return head
