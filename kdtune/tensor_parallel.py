"""Tensor parallel: the ranks of a group split the products of each layer, and the vocabulary.

Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, with the sequence split between the products (Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198, section 4.2.2). Each rank has
some heads and some of the MLP's width. It computes them for all positions, which gives its share of a sum; the shares
are added up as they are cut along the sequence. In between, a rank has some positions of the residual stream.

Weights are DTensors, which FSDP, checkpoints and the optimizer cut and join; layers compute with the plain parts, since
DTensor's own operators take the host longer than a GPU takes to compute them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from kdtune.dtensors import local
from kdtune.losses import Vocabulary, WidthProjection
from kdtune.models import Decoder
from kdtune.models.decoder import MLP, Attention, RMSNorm, rms_norm

# Their names since torch 2.13, which warns of those before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def split(model: Decoder, mesh: DeviceMesh, vocab_size: int | None = None) -> None:
    """Split a model on `meta` over the ranks of a group. They call it with the same tokens then.

    Args:
        model: whole.
        mesh: of the ranks, one dimension.
        vocab_size: entries of the student's vocabulary, if this is its teacher. Both are cut at the same ones, so the
            teacher's embedding and head get as many rows: entries that only it has are padding, which is compared with
            nothing. None: the model's own.
    """
    # DTensor warns (torch 2.13) that a weight which is cut twice is gathered in two steps: when it is saved.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    config, trunk, group = model.config, model.model, mesh.get_group()
    if vocab_size is not None and vocab_size != config.vocab_size:
        for module in (trunk.embed_tokens, model.lm_head):
            module.weight = nn.Parameter(module.weight.new_empty(vocab_size, config.hidden_size))
    trunk.embed_tokens = SplitEmbedding(trunk.embed_tokens.weight, mesh)
    model.lm_head = SplitHead(model.lm_head.weight, config.vocab_size, mesh)
    if config.tie_embeddings:
        model.lm_head.weight = trunk.embed_tokens.weight

    for name, whole in list(trunk.named_modules()):
        owner, _, attribute = name.rpartition(".")
        if isinstance(whole, RMSNorm):
            setattr(trunk.get_submodule(owner), attribute, SplitNorm(whole, mesh))
        elif isinstance(whole, nn.Linear):
            from_parts = attribute in ("o_proj", "down_proj")
            setattr(trunk.get_submodule(owner), attribute, SplitLinear(whole, mesh, from_parts))

    def gathered(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        length = others[0].size(-2) if isinstance(block, Attention) else group.size() * x.size(1)  # that of the cosines
        return gather(x, group, length), *others

    for block in trunk.modules():
        if isinstance(block, (Attention, MLP)):
            block.register_forward_pre_hook(gathered)
            block.register_forward_hook(lambda _, args, share: scatter(share, group))
    # Every rank has the whole gradient of the loss: each takes its positions of it, and nothing is added up.
    trunk.register_forward_hook(lambda _, args, x: gather(x, group, args[0].size(1), are_shares=False))


def share(module: nn.Module, mesh: DeviceMesh) -> None:
    """Have each rank of a group apply linear layers to its own positions, and their gradients added up.

    Args:
        module: in it are `WidthProjection`, with the same numbers on all ranks.
        mesh: of the ranks, one dimension.
    """
    for linear in module.modules():
        if isinstance(linear, WidthProjection):
            linear.weight, linear.bias = (_spread(part, mesh, Replicate()) for part in (linear.weight, linear.bias))
            linear.read = _shared


def gather(x: Tensor, group: dist.ProcessGroup, length: int, are_shares: bool = True) -> Tensor:
    """The positions of all n ranks, [b, length, d], from those of each, [b, ceil(length / n), d].

    Args:
        x: those that are here; the last may be padding.
        group: of the ranks.
        length: of the rows.
        are_shares: the gradients that ranks will have are to be added up; they are the same otherwise.
    """
    return _Gather.apply(x, group, length, are_shares)


def scatter(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The positions of this rank in the sum of the shares of all n, [b, ceil(s / n), d] from [b, s, d]."""
    return _Scatter.apply(share, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, length: int, are_shares: bool) -> Tensor:
        ctx.group, ctx.are_shares = group, are_shares
        return _all_gather(x, group, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.are_shares:
            return _reduce_scatter(grad, ctx.group), None, None, None
        return _padded(grad, ctx.group).chunk(ctx.group.size(), dim=1)[ctx.group.rank()], None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, share.size(1)
        return _reduce_scatter(share, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group, ctx.length), None


def _all_gather(x: Tensor, group: dist.ProcessGroup, length: int) -> Tensor:
    parts = x.new_empty(group.size() * len(x), *x.shape[1:])  # [n * b, s, d]
    _all_gather_single(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)[:, :length]


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = _padded(x, group).unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1)  # [n * b, s, d]
    total = parts.new_empty(len(x), *parts.shape[1:])
    _reduce_scatter_single(total, parts.contiguous(), group=group)
    return total


def _padded(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """With as many positions for each rank."""
    excess = -x.size(1) % group.size()
    return F.pad(x, (0, 0, 0, excess)) if excess else x


class SplitLinear(nn.Linear):
    """A linear layer of which each rank has some outputs; or, `from_parts`, some inputs, and gives a share of a sum."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh, from_parts: bool) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make another weight
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight = _spread(whole.weight, mesh, Shard(1) if from_parts else Shard(0))
        self.bias = None if whole.bias is None else _spread(whole.bias, mesh, Replicate() if from_parts else Shard(0))
        self.bias_share = 1.0 - (from_parts and mesh.get_local_rank() > 0)  # it is added once
        self.from_parts = from_parts

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        if bias is not None:
            bias = _shared(bias) * self.bias_share if self.from_parts else local(bias)
        return F.linear(x, local(self.weight), bias)


class SplitNorm(RMSNorm):
    """A norm that each rank applies to some positions or heads."""

    def __init__(self, whole: RMSNorm, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.weight = _spread(whole.weight, mesh, Replicate())
        self.eps = whole.eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, _shared(self.weight), self.eps)


class SplitEmbedding(nn.Embedding):
    """An embedding of which each rank has some rows; it gives some positions, [b, s / n, d]."""

    def __init__(self, weight: Tensor, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = _spread(weight, mesh, Shard(0))
        self.vocabulary = Vocabulary(mesh.get_group(), len(weight))

    def forward(self, tokens: Tensor) -> Tensor:
        held = self.vocabulary.held(self.num_embeddings)
        absent = (tokens < held.start) | (tokens >= held.stop)
        share = F.embedding((tokens - held.start).masked_fill(absent, 0), local(self.weight))
        return scatter(share.masked_fill(absent[..., None], 0), self.vocabulary.group)


class SplitHead(nn.Linear):
    """A head of which each rank has the entries that `Vocabulary.held` names, for the loss as for a forward.

    Args:
        weight: [v, d], v of the student.
        size: entries of the model's own vocabulary; rows beyond them are zeros, and no entries.
        mesh: of the ranks.
    """

    def __init__(self, weight: Tensor, size: int, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = _spread(weight, mesh, Shard(0))
        self.register_parameter("bias", None)
        self.mesh = mesh
        self.size = min(size, len(weight))
        self.vocabulary = Vocabulary(mesh.get_group(), len(weight), self.size)

    def factors(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the logits of this rank are made of (see `kdtune.losses.Projection`)."""
        part, held = local(self.weight), self.vocabulary.held(self.size)
        count = held.stop - held.start
        return [(hidden, part if len(part) == count else part[:count])]

    def forward(self, x: Tensor) -> Tensor:
        """The logits of all entries, on each rank."""
        part = F.linear(x, local(self.weight))
        shape = torch.Size((*x.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        logits = DTensor.from_local(part, self.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)
        return logits.full_tensor()[..., : self.size]


def _spread(weight: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement]))


def _shared(weight: Tensor) -> Tensor:
    """A weight that all ranks have, for what is different on each: its gradient is the sum of theirs."""
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=[Partial()])
