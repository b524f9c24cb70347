"""Which modules of student and teacher are compared, as the settings of a recipe name them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

from kdtune.config import setting

DistanceName = Literal["cosine", "mse", "normalized_mse", "l1", "smooth_l1", "relation"]
ProjectionName = Literal["shared", "per_pair"]
_WHOLE = re.compile(r"model\.(embed_tokens|layers\.\d+|norm)")  # all that goes on, goes through it
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")


@dataclass
class HiddenLossConfig:
    """Distances between hidden states of student and teacher."""

    # Pairs of modules, each {student: name, teacher: name}, or with a third entry, loss, for a distance of its own, or
    # none. Names may have ranges of equal length: model.layers.{0..3} and model.layers.{0..12..4}
    pairs: list[dict[str, str]] = setting([])
    name: DistanceName = "cosine"  # the distance of pairs that have no loss of their own
    inputs: Literal["student", "teacher"] = "student"  # teacher: after each pair the student goes on from its output
    tokens: Literal["labelled", "all"] = "labelled"  # where it is computed; all: prompts and last tokens, too
    weight: float = setting(1.0, gt=0)  # of the mean over all pairs in the objective, times kd_ratio
    relation_heads: int | None = setting(None, gt=0)  # of relation, a divisor of all widths; null: student's key heads
    projection: ProjectionName | None = None  # a trained map to the teacher's width; null: widths are the same
    projection_init: Literal["normal", "orthogonal"] = "normal"  # normal: as fresh weights of the student; bias 0
    balance: bool = False  # rescale the mean over pairs to the size of the divergence before they are weighted


class Pair(NamedTuple):
    """What is compared: the outputs of two modules, and by which distance.

    None: by none. The student goes on from the teacher's output, and what it has computed before learns nothing there.
    """

    student: str
    teacher: str
    distance: DistanceName | None


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
    found = [
        pair
        for number, given in enumerate(cfg.pairs)
        for pair in _expanded(given, cfg.name, student, teacher, f"hidden_loss.pairs[{number}]")
    ]
    _check_relations(found, cfg.relation_heads)
    for pair in found:
        if found.count(pair) > 1:
            raise ValueError(f"hidden_loss.pairs has {pair.student} with {pair.teacher} twice. Leave one of them out.")
    if all(pair.distance is None for pair in found):
        raise ValueError(
            "hidden_loss.pairs has loss: none everywhere, so that nothing is compared. Give one a distance."
        )
    if cfg.inputs == "teacher":
        _check_blocks(found, cfg.projection, student, teacher)
    elif None in [pair.distance for pair in found]:
        raise ValueError(
            "hidden_loss.pairs has a pair with loss: none, which is for hidden_loss.inputs=teacher: the student then "
            "goes on from the teacher's output all the same. Set that, or leave the pair out."
        )
    return found


def _expanded(
    given: Mapping[str, str], default: DistanceName, student: Sequence[str], teacher: Sequence[str], where: str
) -> list[Pair]:
    """One of the given pairs, or as many as its ranges have numbers; `where` is its name in the settings."""
    if not {"student", "teacher"} <= given.keys() <= {"student", "teacher", "loss"}:
        raise ValueError(
            f"{where} has {', '.join(given) or 'nothing'}. A pair is {{student: ..., teacher: ...}}, "
            "and may have a loss."
        )
    distance: Any = given.get("loss", default)
    _check_known(distance, (*get_args(DistanceName), "none"), f"{where}.loss", "distance")
    names = []
    for role, known in (("student", student), ("teacher", teacher)):
        names.append(written_out(given[role], f"{where}.{role}"))
        for name in names[-1]:
            _check_known(name, known, f"{where}.{role}", "module")
    if len(names[0]) != len(names[1]):
        raise ValueError(
            f"{where}: {given['student']} are {len(names[0])} modules and {given['teacher']} are {len(names[1])}: "
            "each of one side needs its own of the other. A range may have a step, as in {0..30..2}."
        )
    distance = None if distance == "none" else distance
    return [Pair(one, other, distance) for one, other in zip(*names, strict=True)]


def _check_relations(pairs: Sequence[Pair], relation_heads: int | None) -> None:
    """Refuse relations of what has no heads, heads that are compared otherwise, and a setting of none."""
    for pair in pairs:
        of_heads = [".self_attn." in name for name in pair[:2]]
        if any(of_heads) is not all(of_heads) or (pair.distance == "relation") is not all(of_heads):
            raise ValueError(
                f"hidden_loss.pairs has {pair.student} with {pair.teacher} and loss {pair.distance}: relation compares "
                "queries, keys or values, such as model.layers.0.self_attn.keys, and nothing else does."
            )
    if relation_heads is not None and all(pair.distance != "relation" for pair in pairs):
        raise ValueError(
            f"hidden_loss.relation_heads={relation_heads} is about pairs with loss: relation, and there are none. "
            "Leave it out."
        )


def _check_blocks(
    pairs: Sequence[Pair], projection: ProjectionName | None, student: Sequence[str], teacher: Sequence[str]
) -> None:
    """Refuse pairs that do not cut the models into blocks, each of which can learn what its teacher's does."""
    if projection is not None:
        raise ValueError(
            f"hidden_loss.projection={projection} does not go with hidden_loss.inputs=teacher: what is trained is to "
            "compute from what the layers before it put out, and not from a projection of it. Leave one of them out."
        )
    for name in [name for pair in pairs for name in pair[:2]]:
        if not _WHOLE.fullmatch(name):
            raise ValueError(
                f"hidden_loss.inputs=teacher lets the student go on from the teacher's output, and beside {name} a "
                "residual stream goes on, which would be the student's. Pair model.embed_tokens, layers such as "
                "model.layers.0, or model.norm."
            )
    for one, other in pairwise(sorted(pairs, key=lambda pair: student.index(pair.student))):
        if one.student == other.student or teacher.index(one.teacher) >= teacher.index(other.teacher):
            raise ValueError(
                f"hidden_loss.inputs=teacher lets {other.student} learn to make {other.teacher} of {one.teacher}, with "
                f"which {one.student} is paired; but in the teacher the one does not come of the other. Pair later "
                "modules of the student with later ones of the teacher, each once."
            )


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


def _check_known(name: str, known: Sequence[str], where: str, kind: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0)
        raise ValueError(f"{where}={name}: no such {kind}. Did you mean {near[0]}? {_range_of(known)}".rstrip())


def _range_of(known: Sequence[str]) -> str:
    layers = {int(match[1]) for name in known if (match := re.search(r"\.layers\.(\d+)", name))}
    return f"The layers are 0 to {max(layers)}." if layers else ""
