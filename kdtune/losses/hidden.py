"""Distances between hidden states: what modules of the student put out, beside what modules of the teacher do.

    hidden = mean over pairs of  sum over tokens of  D(P s, t) / num_tokens

s is the output of the student's module at a labelled token, t that of the teacher's, P a trained linear map to the
teacher's width, if there is one (Romero et al. 2014, "FitNets", arXiv:1412.6550; Jiao et al. 2019, "TinyBERT",
arXiv:1909.10351). All of it is in float32, or in float64 for such models.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune.losses.chunked import IGNORE, Loss
from kdtune.losses.pairs import DistanceName, Pair, ProjectionName
from kdtune.losses.relations import relation
from kdtune.losses.targets import SparseTargets, Targets
from kdtune.losses.vocabulary import Vocabulary

# Numbers that are in float32 at one time: on the CPU what its caches hold, on a GPU what keeps it busy.
BLOCK, BLOCK_ON_GPU = 2**17, 2**24


def cosine(s: Tensor, t: Tensor) -> Tensor:
    """1 - cos(s, t): the direction alone."""
    return 1 - F.cosine_similarity(s, t, dim=-1)


def mse(s: Tensor, t: Tensor) -> Tensor:
    """The mean of (s - t)^2 over the width."""
    return (s - t).square().mean(-1)


def normalized_mse(s: Tensor, t: Tensor) -> Tensor:
    """|s - t|^2 / |t|^2: 1 if s is 0, whatever the size of t."""
    return (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=torch.finfo(t.dtype).tiny)


def l1(s: Tensor, t: Tensor) -> Tensor:
    """The mean of |s - t| over the width."""
    return (s - t).abs().mean(-1)


def smooth_l1(s: Tensor, t: Tensor) -> Tensor:
    """The mean over the width of (s - t)^2 / 2 where |s - t| < 1, else of |s - t| - 1/2."""
    return F.smooth_l1_loss(s, t, reduction="none").mean(-1)


# Each is of [..., d] and [..., d], and [...] then. `relation` is of whole rows.
DISTANCES: Mapping[DistanceName, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "mse": mse,
    "normalized_mse": normalized_mse,
    "l1": l1,
    "smooth_l1": smooth_l1,
}


class WidthProjection(nn.Linear):
    """From the student's width to the teacher's. In float32, since its steps are small; products are as what comes in.

    Attributes:
        read: what is done with a parameter before it is used; a tensor-parallel group sums the gradient there.
    """

    read: Callable[[Tensor], Tensor] = staticmethod(lambda parameter: parameter)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read(self.weight).to(x.dtype), self.read(self.bias).to(x.dtype))

    @torch.no_grad()
    def init(self, how: Literal["normal", "orthogonal"], std: float, generator: torch.Generator) -> None:
        """The same numbers on any device: drawn on the host.

        Args:
            how: `orthogonal` keeps lengths, or as much of them as fits; `normal` has the standard deviation `std`.
            std: of `normal`.
            generator: on the host.
        """
        if self.weight.is_meta:
            return
        drawn = torch.empty(self.weight.shape)
        if how == "normal":
            drawn.normal_(std=std, generator=generator)
        else:
            nn.init.orthogonal_(drawn, generator=generator)
        self.weight.copy_(drawn)
        self.bias.zero_()


class HiddenLoss(nn.Module):
    """What pairs of modules differ by, and the projections that are trained for it.

    Attributes:
        pairs: what is compared.
        projections: one for each pair, one for all, or none.
        vocabulary: of the student's head, if a tensor-parallel group splits it. Hidden states then have the positions
            of this rank.
        tokens: at which positions.
        instead: by the student's module the teacher's whose output it goes on from, if that is how it is trained.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        projection: ProjectionName | None = None,
        widths: tuple[int, int] = (0, 0),
        vocabulary: Vocabulary | None = None,
        inputs: Literal["student", "teacher"] = "student",
        tokens: Literal["labelled", "all"] = "labelled",
        relation_heads: int = 1,
    ) -> None:
        """
        Args:
            pairs: what is compared; of `inputs` `teacher` also what is not.
            projection: whether each pair has a projection of its own, or all have one. None: none.
            widths: of student and teacher.
            vocabulary: see above.
            inputs: `teacher`: after the student's module of a pair go on from the teacher's output.
            tokens: where they are compared: at positions with a label, or at all but padding.
            relation_heads: of `relation`, see `kdtune.losses.relations`.
        """
        super().__init__()
        self.pairs = tuple(pair for pair in pairs if pair.distance is not None)
        self.instead = {pair.student: pair.teacher for pair in pairs} if inputs == "teacher" else {}
        self.relation_heads = relation_heads
        num_projected = sum(pair.distance != "relation" for pair in self.pairs)
        count = {None: 0, "shared": 1, "per_pair": num_projected}[projection]
        self.projections = nn.ModuleList(WidthProjection(*widths) for _ in range(count))
        self.vocabulary = vocabulary
        self.tokens = tokens

    @property
    def of_student(self) -> tuple[str, ...]:
        """The modules of the student whose outputs are compared, each once."""
        return tuple(dict.fromkeys(pair.student for pair in self.pairs))

    @property
    def of_teacher(self) -> tuple[str, ...]:
        """Those of the teacher, and those from whose outputs the student goes on."""
        return tuple(dict.fromkeys([*(pair.teacher for pair in self.pairs), *self.instead.values()]))

    def given(self, targets: Targets | SparseTargets) -> dict[str, Tensor]:
        """By module of the student what it goes on from in place of that one's output; see `Decoder.hidden_states`."""
        assert isinstance(targets, Targets)
        return {name: targets.captured[of_teacher] for name, of_teacher in self.instead.items()}

    def forward(
        self,
        captured: Mapping[str, Tensor],
        targets: Targets | SparseTargets,
        labels: Tensor,
        num_tokens: int,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The distance of each pair, [pairs]: sums over the tokens that count, divided by `num_tokens`.

        Args:
            captured: of each module of the student its output, [b, s, d]; of a tensor-parallel group the positions of
                this rank.
            targets: with the outputs of the teacher's modules; or these of the labelled tokens alone, [t, d].
            labels: [b, s], of all positions of the group.
            num_tokens: of the whole optimizer step, those that count.
            lengths: [b], tokens of each row before its padding; None: all.
            positions: [b, s], counted from 0 in each document; None: a row is one document.
        """
        assert isinstance(targets, Targets)
        counted = labels != IGNORE  # [b, s]
        place = torch.arange(labels.size(1), device=labels.device)
        if self.tokens == "all":
            counted = torch.ones_like(counted) if lengths is None else place < lengths[:, None]
        if self.vocabulary is not None:
            counted = _slice(counted, self.vocabulary)
        sums = []
        projections = itertools.cycle(self.projections)
        for pair in self.pairs:
            s, t = captured[pair.student], targets.captured[pair.teacher]
            if pair.distance == "relation":
                block = BLOCK if s.device.type == "cpu" else BLOCK_ON_GPU
                first = torch.zeros_like(labels) if positions is None else place - positions
                sums.append(relation(s, t, counted, first, self.relation_heads, block))
                continue
            if self.projections:
                s = next(projections)(s)
            if t.shape[:-1] != counted.shape:
                t = t.new_zeros(*counted.shape, t.size(-1)).masked_scatter(counted[..., None], t)
            assert pair.distance is not None
            sums.append(_Distance.apply(s, t, counted, DISTANCES[pair.distance]))
        values = torch.stack(sums) / num_tokens
        if self.vocabulary is not None:  # the value of all ranks, with the gradient of this one's share
            share = values.detach()
            values = values + (self.vocabulary.sum(share.clone()) - share)
        return values

    def describe(self, logged: Sequence[float], *, balance: bool) -> dict[str, float]:
        """By their names in a log: the mean over pairs, each pair, and what the mean was multiplied by.

        Args:
            logged: what `Loss.logged` has beyond its first four.
            balance: whether there is a factor.
        """
        balanced, *values = logged
        mean = sum(values) / len(values)
        count = Counter(pair.student for pair in self.pairs)
        names = [
            pair.student if count[pair.student] == 1 else f"{pair.student}:{pair.teacher}:{pair.distance}"
            for pair in self.pairs
        ]
        return {
            "hidden_loss": mean,
            **{f"hidden_loss/{name}": value for name, value in zip(names, values, strict=True)},
            **({"hidden_factor": balanced / (mean or 1)} if balance else {}),
        }


def add_hidden(loss: Loss, values: Tensor, weight: float, *, balance: bool = False) -> Loss:
    """The objective with hidden states in it: total + weight * factor * mean(values).

    Args:
        loss: without them.
        values: [pairs], as from `HiddenLoss`.
        weight: of their mean.
        balance: the factor makes their mean as large as the divergence, which may itself be balanced; it has no
            gradient. As in Model Optimizer's `LogitsAndIntermediatesLossBalancer` it is that of this call, so that a
            step depends on its split into micro-batches. Else it is 1.
    """
    mean, factor = values.mean(), torch.ones_like(values[0])
    if balance:
        size = mean.detach()
        factor = torch.where(size > 0, loss.kd * loss.kd_factor / size, factor)
    total = loss.total + weight * factor * mean
    return dataclasses.replace(loss, total=total, hidden=values.detach(), hidden_factor=factor)


def _slice(counted: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The positions of this rank, [b, ceil(s / n)], of which the last may be padding."""
    excess = -counted.size(1) % vocabulary.ranks
    return F.pad(counted, (0, excess)).chunk(vocabulary.ranks, dim=1)[vocabulary.rank]


class _Distance(torch.autograd.Function):
    """A sum over positions. Its gradient is computed in the forward, a block at a time, and scaled in the backward.

    So nothing of the width is kept in float32, and of the teacher's side nothing at all.
    """

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, t: Tensor, counted: Tensor, distance: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        dtype = torch.promote_types(s.dtype, torch.float32)
        size = max(1, (BLOCK if s.device.type == "cpu" else BLOCK_ON_GPU) // s.size(-1))
        blocks = zip(
            *(x.detach().flatten(0, 1).split(size) for x in (s, t)), counted.flatten().split(size), strict=True
        )
        total, grads = s.new_zeros((), dtype=dtype), []
        for s_block, t_block, is_counted in blocks:
            with torch.enable_grad():
                wide = s_block.to(dtype).detach().requires_grad_()
                # Not a product: what does not count may be infinite, as where a cached teacher is not known.
                part = distance(wide, t_block.to(dtype)).where(is_counted, 0).sum()
                (grad,) = torch.autograd.grad(part, wide)
            total += part.detach()
            grads.append(grad.to(s.dtype))
        ctx.save_for_backward(torch.cat(grads).view(s.shape))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(grad.dtype), None, None, None
