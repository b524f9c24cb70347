"""Pipeline parallel: each rank of a group, a stage, has some layers of a model and passes hidden states on to the next.

Huang et al. 2019, "GPipe", arXiv:1811.06965; the order of a step's micro-batches is that of Narayanan et al. 2021,
"Efficient Large-Scale Language Model Training", arXiv:2104.04473, section 2.2. The stages of
`torch.distributed.pipelining` take micro-batches of one shape, fixed by the first; here each has its own length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdtune.dtensors import local
from kdtune.models import Decoder, ModelConfig, parameter_shapes
from kdtune.stage import Stage


def layers_of_stages(config: ModelConfig, count: int) -> list[range]:
    """Which layers each stage has, at least one: with the head counted as the layers that have as many weights.

    A head's products take as long as those of such layers, and the last stage has it.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in parameter_shapes(config).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    total = config.num_layers + config.vocab_size * config.hidden_size / layer
    bounds = [0]
    for stage in range(1, count):
        least, most = bounds[-1] + 1, config.num_layers - (count - stage)
        bounds.append(max(least, min(most, round(total * stage / count))))
    return [range(start, end) for start, end in pairwise([*bounds, config.num_layers])]


def weights_of_stages(config: ModelConfig, count: int) -> list[list[str]]:
    """Which weights each stage has, by their names in a checkpoint, in the order there. The first has a tied one."""
    stages: list[list[str]] = [[] for _ in range(count)]
    stage_of_layer = {
        str(layer): stage for stage, layers in enumerate(layers_of_stages(config, count)) for layer in layers
    }
    for name in parameter_shapes(config):
        if name.startswith("model.layers."):
            stages[stage_of_layer[name.split(".")[2]]].append(name)
        else:
            stages[0 if name == "model.embed_tokens.weight" else -1].append(name)
    return stages


def split(model: Decoder, stage: Stage, num_slices: int = 1) -> None:
    """Leave a model on `meta` what `stage` has of it.

    All stages call its `hidden` with the same tokens. The last returns hidden states, the others zeros, whose gradient
    brings that of the last; for a loss on these a stage has a head of zeros, and what it scores is to be nothing.

    Args:
        model: whole, or already split over a tensor-parallel group.
        stage: this rank's.
        num_slices: ranks of a tensor-parallel group, which split the sequence between layers.
    """
    config, trunk = model.config, model.model
    mine = layers_of_stages(config, stage.count)[stage.index]
    for index in range(config.num_layers):
        if index not in mine:
            trunk.layers[index] = _Elsewhere()
    if not stage.is_first:
        trunk.embed_tokens = _Inlet(stage, trunk.embed_tokens.weight, num_slices)  # type: ignore[assignment]
    if stage.is_last:
        model.lm_head.register_forward_hook(lambda _, args, logits: stage.share_last(logits.contiguous()))
    else:
        trunk.norm = _Outlet(stage)  # type: ignore[assignment]
        model.lm_head = _HeadElsewhere(stage, model.lm_head.weight, config)  # type: ignore[assignment]
    model.stage = stage


Turn = tuple[Literal["forward", "backward"], int]  # and the number of a micro-batch


def schedule(model: nn.Module, count: int) -> Iterator[Turn]:
    """In which order the micro-batches of a step go through a model: alone, each forward and then backward.

    Args:
        model: what is trained; gradients that ranks have to add up are added in the last backward.
        count: micro-batches of this rank.
    """
    stage = getattr(model, "stage", None)
    for direction, i in one_forward_one_backward(count, 0 if stage is None else stage.count - 1 - stage.index):
        if direction == "backward":
            _sync_gradients(model, is_last=i == count - 1)
        yield direction, i
    if stage is not None:
        _add_tied_gradients(model, stage)
        stage.finish()


def one_forward_one_backward(count: int, stages_behind: int) -> Iterator[Turn]:
    """The order of a stage: so many forwards first, so that those behind it have something to do, then in turns.

    It keeps the activations of one micro-batch more than there are stages behind it, or of all if they are fewer.
    """
    ahead = min(stages_behind, count)
    for i in range(count + ahead):
        if i < count:
            yield "forward", i
        if i >= ahead:
            yield "backward", i - ahead


def _sync_gradients(model: Any, is_last: bool) -> None:
    """Sum the gradients over the ranks in the next backward, which is the last of the step, or only keep them."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDPModule, whose import takes a second
        model.set_requires_gradient_sync(is_last)
        if model.stage is not None:  # while others are on their way, it must not forget in what order they came
            model.set_is_last_backward(is_last)


def _add_tied_gradients(model: nn.Module, stage: Stage) -> None:
    """Of an embedding and a head that are one weight, which the first and the last stage have."""
    assert isinstance(model, Decoder)
    if model.config.tie_embeddings and (stage.is_first or stage.is_last):
        weight = model.model.embed_tokens.weight if stage.is_first else model.head.weight
        assert weight.grad is not None
        stage.add_other_end(local(weight.grad))


class _Elsewhere(nn.Module):
    """A layer that another stage has."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


class _Inlet(nn.Module):
    """In the place of the embedding: the hidden states of the stage before, [b, ceil(s / n), d]."""

    like: Tensor

    def __init__(self, stage: Stage, weight: Tensor, num_slices: int) -> None:
        super().__init__()
        self.stage, self.width, self.num_slices = stage, weight.size(1), num_slices
        # For its dtype, and the device to which the model goes.
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device="meta"), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        b, s = tokens.shape
        shape = (b, -(-s // self.num_slices), self.width)
        return _Receive.apply(self.like.new_zeros((), requires_grad=torch.is_grad_enabled()), shape, self.stage)


class _Outlet(nn.Module):
    """In the place of the last norm: hidden states go to the next stage, and zeros stay."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        return _Send.apply(x, self.stage)


class _HeadElsewhere(nn.Module):
    """In the place of the head: for a loss zeros, which take no memory; for a forward what the last stage computes."""

    like: Tensor
    bias = None

    def __init__(self, stage: Stage, weight: Tensor, config: ModelConfig) -> None:
        super().__init__()
        self.stage = stage
        # Tensor parallel leaves a teacher no more entries than its student has.
        self.in_features, self.out_features = config.hidden_size, min(config.vocab_size, len(weight))
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device="meta"), persistent=False)

    @property
    def weight(self) -> Tensor:  # [v, d]
        return self.like.new_zeros(()).expand(self.out_features, self.in_features)

    def factors(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(hidden, self.weight)]

    def forward(self, x: Tensor) -> Tensor:
        return self.stage.share_last(x.new_empty(*x.shape[:-1], self.out_features))


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Tensor, shape: tuple[int, ...], stage: Stage) -> Tensor:
        ctx.stage = stage
        return stage.receive(graph.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.stage.send(grad, back=True)
        return None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Stage) -> Tensor:
        ctx.stage = stage
        stage.send(x)
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.stage.receive(torch.empty_like(grad, memory_format=torch.contiguous_format), back=True), None
