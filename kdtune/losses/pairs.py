"""Which modules of student and teacher are compared, as the settings of a recipe name them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from kdtune.config import setting

DistanceName = Literal["cosine", "mse", "normalized_mse", "l1", "smooth_l1"]
ProjectionName = Literal["shared", "per_pair"]
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")


@dataclass
class HiddenLossConfig:
    """Distances between hidden states of student and teacher."""

    # Pairs of modules, each {student: name, teacher: name}, or with a third entry, loss, for a distance of its own.
    # Names may have ranges of equal length: model.layers.{0..3} and model.layers.{0..12..4}
    pairs: list[dict[str, str]] = setting([])
    name: DistanceName = "cosine"  # the distance of pairs that have no loss of their own
    weight: float = setting(1.0, gt=0)  # of the mean over all pairs in the objective, times kd_ratio
    projection: ProjectionName | None = None  # a trained map to the teacher's width; null: widths are the same
    projection_init: Literal["normal", "orthogonal"] = "normal"  # normal: as fresh weights of the student; bias 0
    balance: bool = False  # rescale the mean over pairs to the size of the divergence before they are weighted


class Pair(NamedTuple):
    """What is compared: the outputs of two modules, and by which distance."""

    student: str
    teacher: str
    distance: DistanceName


def pairs_of(cfg: HiddenLossConfig, student: Sequence[str], teacher: Sequence[str]) -> list[Pair]:
    """The pairs that the settings name, with ranges written out.

    Args:
        cfg: the settings.
        student: names of its modules.
        teacher: names of its modules, as far as they can be asked.

    Raises:
        ValueError: a name that is none, with the nearest that is; ranges that do not go with each other; or a setting
            that would change nothing.
    """
    if not cfg.pairs:
        raise ValueError(
            "hidden_loss.pairs is empty, so there is nothing to compare. Give some, such as "
            "hidden_loss.pairs=[{student: model.norm, teacher: model.norm}], or leave hidden_loss out."
        )
    if cfg.projection is None and cfg.projection_init != "normal":
        raise ValueError(
            f"hidden_loss.projection_init={cfg.projection_init} is about a projection, and hidden_loss.projection is "
            "null. Set it to shared or per_pair, or leave projection_init out."
        )
    found: list[Pair] = []
    for number, given in enumerate(cfg.pairs):
        where = f"hidden_loss.pairs[{number}]"
        if not {"student", "teacher"} <= given.keys() <= {"student", "teacher", "loss"}:
            raise ValueError(
                f"{where} has {', '.join(given) or 'nothing'}. A pair is {{student: ..., teacher: ...}}, "
                "and may have a loss."
            )
        distance: Any = given.get("loss", cfg.name)
        _check_known(distance, get_args(DistanceName), f"{where}.loss")
        names = []
        for role, known in (("student", student), ("teacher", teacher)):
            names.append(written_out(given[role], f"{where}.{role}"))
            for name in names[-1]:
                _check_known(name, known, f"{where}.{role}")
        if len(names[0]) != len(names[1]):
            raise ValueError(
                f"{where}: {given['student']} are {len(names[0])} modules and {given['teacher']} are {len(names[1])}: "
                "each of one side needs its own of the other. A range may have a step, as in {0..30..2}."
            )
        found += [Pair(one, other, distance) for one, other in zip(*names, strict=True)]
    for pair in found:
        if found.count(pair) > 1:
            raise ValueError(f"hidden_loss.pairs has {pair.student} with {pair.teacher} twice. Leave one of them out.")
    return found


def written_out(name: str, where: str = "the name") -> list[str]:
    """`layers.{0..4..2}.mlp` as layers.0.mlp, layers.2.mlp, layers.4.mlp: both ends belong to a range.

    Raises:
        ValueError: not a range, or more than one.
    """
    prefix, *rest = _RANGE.split(name)
    if "{" in _RANGE.sub("", name) or len(rest) > 4:
        raise ValueError(f"{where}={name}: a name may have one range, such as {{0..15}}, or with a step {{0..15..2}}.")
    if not rest:
        return [name]
    first, last, step, suffix = rest
    numbers = range(int(first), int(last) + 1, int(step or 1)) if step != "0" else range(0)
    if not numbers:
        raise ValueError(f"{where}={name}: the range is empty. It goes upward, in steps of at least 1.")
    return [f"{prefix}{number}{suffix}" for number in numbers]


def _check_known(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0)
        raise ValueError(f"{where}={name}: there is no such. Did you mean {near[0]}? {_range_of(known)}".rstrip())


def _range_of(known: Sequence[str]) -> str:
    layers = {int(match[1]) for name in known if (match := re.search(r"\.layers\.(\d+)", name))}
    return f"The layers are 0 to {max(layers)}." if layers else ""
