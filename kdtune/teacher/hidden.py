"""Hidden states of student and teacher that are to be alike: from the settings to what computes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdtune import data, distributed, losses
from kdtune.data import Batch
from kdtune.distributed import Ranks
from kdtune.losses import HiddenLoss, HiddenLossConfig, Pair, SparseTargets, Targets
from kdtune.models import Decoder, ModelConfig, from_hf_config, head_names, module_names
from kdtune.teacher_cache import read_card

CACHED = "model.norm"  # all that a cache of hidden states has


def check_hidden_loss(cfg: Any) -> None:
    """Refuse pairs of which one side is nowhere, or that cannot be compared.

    Args:
        cfg: a recipe's settings; of each model `config.json` is read, or the card of a cache.

    Raises:
        FileNotFoundError, ValueError: which pair or setting, why and what to do.
    """
    settings: HiddenLossConfig | None = cfg.hidden_loss
    if settings is None:
        return
    if cfg.kd_ratio == 0:
        raise ValueError(
            "hidden_loss is a part of what the teacher teaches, which kd_ratio=0 leaves out. Raise kd_ratio, or leave "
            "hidden_loss out."
        )
    if settings.inputs == "teacher" and cfg.teacher.cache_dir is not None:
        raise ValueError(
            f"hidden_loss.inputs=teacher lets layers of the student compute from what layers of the teacher put out, "
            f"and of these teacher.cache_dir={cfg.teacher.cache_dir} has none. Ask the teacher during the run "
            "(teacher_checkpointer), or leave hidden_loss.inputs out."
        )
    if settings.tokens == "all" and cfg.teacher.cache_dir is not None:
        raise ValueError(
            f"hidden_loss.tokens=all compares hidden states of prompts, too, and teacher.cache_dir="
            f"{cfg.teacher.cache_dir} has those at labelled tokens alone. Leave it out, or ask the teacher during the "
            "run (teacher_checkpointer)."
        )
    pairs = _pairs(cfg)
    if any(pair.distance == "relation" for pair in pairs):
        _check_relations(cfg, pairs)
    student, teacher = _widths(cfg)
    if all(pair.distance == "relation" for pair in pairs):
        if settings.projection is not None:
            raise ValueError(
                f"hidden_loss.projection={settings.projection} is for widths that differ, and pairs with loss: "
                "relation, the only ones here, compare any. Leave it out."
            )
        return
    if student != teacher and settings.inputs == "teacher":
        raise ValueError(
            f"hidden_loss.inputs=teacher lets layers of the student, which take {student} numbers of a token, compute "
            f"from what layers of the teacher put out, which are {teacher}. Take a student of the teacher's width, "
            "such as one of its layers (checkpointer.keep_layers), or leave hidden_loss.inputs out."
        )
    if student != teacher and settings.projection is None:
        raise ValueError(
            f"The student's hidden states have {student} numbers and the teacher's {teacher}, and hidden_loss compares "
            "them one by one. Give hidden_loss.projection=shared, which trains a map between them, or per_pair for "
            "one of each pair."
        )


def add_hidden_loss(student: Decoder, cfg: Any, ranks: Ranks) -> None:
    """Give the student `beside` what compares its hidden states with the teacher's, if the settings ask for it.

    Args:
        student: as it is trained, spread over the ranks if it is to be. All of them must call.
        cfg: a recipe's settings, once `check_hidden_loss` has seen them.
        ranks: the processes.
    """
    settings: HiddenLossConfig | None = cfg.hidden_loss
    if settings is None:
        return
    vocabulary = getattr(student.head, "vocabulary", None)
    with torch.device("meta"):
        student.beside = HiddenLoss(
            _pairs(cfg),
            settings.projection,
            _widths(cfg),
            vocabulary,
            settings.inputs,
            settings.tokens,
            _relation_heads(settings, student.config),
        )
    dtype = torch.promote_types(student.head.weight.dtype, torch.float32)
    student.beside.to(dtype).to_empty(device=cfg.parallel.place(ranks.device))
    generator = torch.Generator().manual_seed(cfg.seed)
    for projection in student.beside.projections:
        projection.init(settings.projection_init, student.config.initializer_range, generator)
    distributed.share_beside(student, ranks, cfg.parallel)


def _check_relations(cfg: Any, pairs: Sequence[Pair]) -> None:
    for name in ("context", "tensor"):
        if (degree := getattr(cfg.parallel, name)) > 1:
            raise ValueError(
                f"loss: relation does not go with parallel.{name}={degree}: it compares each token with all before it, "
                "by all heads, of which each process has a part. Take parallel.data_shard instead."
            )
    student, teacher = (
        from_hf_config(checkpointer.read_config()) for checkpointer in (cfg.checkpointer, cfg.teacher_checkpointer)
    )
    num_heads = _relation_heads(cfg.hidden_loss, student)
    for pair in pairs:
        if pair.distance != "relation":
            continue
        for name, width in ((pair.student, head_names(student)), (pair.teacher, head_names(teacher))):
            if width[name] % num_heads:
                raise ValueError(
                    f"hidden_loss.relation_heads is {num_heads}, and {name} has {width[name]} numbers of a token, "
                    "which do not make as many relation heads. Give hidden_loss.relation_heads a divisor of that."
                )


def _relation_heads(settings: HiddenLossConfig, student: ModelConfig) -> int:
    return settings.relation_heads or student.num_kv_heads


def run_student(student: Decoder, batch: Batch, targets: Targets | SparseTargets) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states, [b, s, d], and those that are compared by module, from what the settings say.

    Args:
        student: with what `add_hidden_loss` gave it, if anything.
        batch: on its device.
        targets: of the teacher, which was asked for `HiddenLoss.of_teacher`.
    """
    hidden_loss: HiddenLoss | None = student.beside
    where = (batch.tokens, batch.positions, batch.documents)
    if hidden_loss is None:
        return student.hidden(*where), {}
    return student.hidden_states(*where, hidden_loss.of_student, hidden_loss.given(targets))


def compare_hidden(
    student: Decoder, captured: dict[str, Tensor], targets: Targets | SparseTargets, batch: Batch, num_tokens: int
) -> Tensor | None:
    """The distance of each pair, [pairs], None without any; `captured` is from `run_student`, as are the others.

    Args:
        num_tokens: of the whole step, see `count_compared`.
    """
    if student.beside is None:
        return None
    where = (batch.lengths, batch.positions)
    distances: Tensor = student.beside(captured, targets, batch.labels, num_tokens, *where)
    return distances


def count_compared(student: Decoder, batches: Sequence[Batch], ranks: Ranks, num_labels: int) -> int:
    """What distances of a step are divided by: how many positions of all ranks they are sums over.

    Args:
        student: with what `add_hidden_loss` gave it.
        batches: of this rank.
        ranks: the processes, all of which call.
        num_labels: labels of the step, on all of them.
    """
    compares_all = student.beside is not None and student.beside.tokens == "all"
    return ranks.total(data.count_tokens(batches)) if compares_all else num_labels


def _names(checkpointer: Any) -> list[str]:
    config = from_hf_config(checkpointer.read_config())
    return [*module_names(config), *head_names(config)]


def _pairs(cfg: Any) -> list[Pair]:
    student = _names(cfg.checkpointer)
    if cfg.teacher.cache_dir is None:
        teacher = _names(cfg.teacher_checkpointer)
        return losses.pairs_of(cfg.hidden_loss, student, teacher)
    kind = read_card(cfg.teacher.cache_dir).store.kind
    if kind != "hidden":
        raise ValueError(
            f"teacher.cache_dir={cfg.teacher.cache_dir} has {kind} of the teacher's distributions, and hidden_loss "
            "compares hidden states. Ask the teacher during the run (teacher_checkpointer), make a cache of "
            "store.kind=hidden, which has those of model.norm, or leave hidden_loss out."
        )
    try:
        return losses.pairs_of(cfg.hidden_loss, student, [CACHED])
    except ValueError as error:
        raise ValueError(
            f"{error} (Of the teacher's hidden states teacher.cache_dir={cfg.teacher.cache_dir} has those of {CACHED} "
            "alone. Others are there if the teacher is asked during the run: teacher_checkpointer.)"
        ) from None


def _widths(cfg: Any) -> tuple[int, int]:
    """Of student and teacher."""
    student = from_hf_config(cfg.checkpointer.read_config()).hidden_size
    if cfg.teacher.cache_dir is None:
        return student, from_hf_config(cfg.teacher_checkpointer.read_config()).hidden_size
    hidden = read_card(cfg.teacher.cache_dir).hidden
    assert hidden is not None  # `_pairs` has seen it
    return student, hidden["size"]
