"""What of a model counts most on a text, by what its layers do to each token.

Channels and heads: activation statistics, as Muralidharan et al. 2024, "Compact Language Models via Pruning and
Knowledge Distillation" (Minitron), arXiv:2407.14679, section 2.2. Layers: block influence, Men et al. 2024,
"ShortGPT", arXiv:2403.03853, equation 1; of a block of layers, Gromov et al. 2024, arXiv:2403.17887.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune.data import IGNORE
from kdtune.models import Decoder, ModelConfig
from kdtune.pruning.config import Aggregation
from kdtune.pruning.cut import Kept


class Statistics:
    """Sums over the tokens that a model reads, in float32 on its device; none grows with the text.

    Attributes:
        num_tokens: that were read.
    """

    def __init__(self, model: Decoder, *, aggregation: Aggregation = "l2", block_size: int = 1) -> None:
        """
        Args:
            model: which will be watched; a whole one, in one process.
            aggregation: of a channel or a head over tokens: the mean of its magnitude, or the root of its mean square.
            block_size: how many layers that follow each other are judged together.
        """
        self.num_tokens = 0
        self._model = model
        self._order = 1 if aggregation == "mean" else 2
        self._block_size = block_size
        self._sums: dict[str, Tensor] = {}  # by name of a module: [channels] or [heads] of what goes in or comes out
        self._energy: dict[str, Tensor] = {}  # by name of a norm: [d] squares of what comes out, without its weight
        self._similarity = torch.zeros(model.config.num_layers - block_size + 1, device=model.device)

    @contextmanager
    def watch(self, is_read: Tensor) -> Iterator[None]:
        """Count what the model does within, for one forward.

        Args:
            is_read: [b, s] bool, the positions that count; padding does not.
        """
        self.num_tokens += int(is_read.sum())
        mask = is_read.to(self._model.device)
        inputs: dict[int, Tensor] = {}  # of the layers whose block has not ended
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                kind = name.rpartition(".")[2]
                if kind in ("o_proj", "down_proj"):
                    hook: Any = functools.partial(self._see_projection, name, mask)
                elif kind in ("norm", "input_layernorm", "post_attention_layernorm"):
                    hook = functools.partial(self._see_norm, name, mask)
                else:
                    continue
                stack.callback(module.register_forward_hook(hook).remove)
            for index, layer in enumerate(self._model.model.layers):
                hook = functools.partial(self._see_layer, index, mask, inputs)
                stack.callback(layer.register_forward_hook(hook).remove)
            yield

    def layers(self) -> Tensor:
        """[n] influence of each layer or block: 1 - mean cosine of what goes in and what comes out, 0 if they agree."""
        return 1 - self._similarity / self.num_tokens

    def heads(self) -> Tensor:
        """[layers, heads] norm of a head's part of what goes into o_proj."""
        return self._of_layers("self_attn.o_proj")

    def mlp_channels(self) -> Tensor:
        """[layers, channels] of what goes into down_proj: activation times gate."""
        return self._of_layers("mlp.down_proj")

    def hidden_channels(self) -> Tensor:
        """[d] of what comes out of the norms, summed over all of them."""
        return torch.stack([self._mean(self._sums[name]) for name in self._energy]).sum(0)

    def norm_scales(self, kept: Tensor) -> dict[str, float]:
        """By name of a norm: what its weight is multiplied by, for its outputs to keep their size.

        A norm divides by the root mean square over all channels. Of those that stay it is another one: larger, if the
        others were small.

        Args:
            kept: [n] indices of hidden channels.
        """
        scales = {}
        for name, energy in self._energy.items():
            squares = energy / self.num_tokens  # mean over tokens of x^2 / (mean square of all + eps)
            # That of (mean square of the kept + eps) / (mean square of all + eps).
            scales[name] = float((squares[kept].mean() + 1 - squares.mean()).sqrt())
        return scales

    def _of_layers(self, name: str) -> Tensor:
        num_layers = self._model.config.num_layers
        return torch.stack([self._mean(self._sums[f"model.layers.{index}.{name}"]) for index in range(num_layers)])

    def _mean(self, sums: Tensor) -> Tensor:
        return (sums / self.num_tokens) ** (1 / self._order)

    def _see_projection(self, name: str, mask: Tensor, module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        (x,) = args
        if name.endswith("o_proj"):
            heads = x.unflatten(-1, (-1, self._model.config.head_dim))
            x = torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32)  # [b, s, h]
        _add(self._sums, name, x, mask, self._order)

    def _see_norm(self, name: str, mask: Tensor, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        (x,) = args
        _add(self._sums, name, out, mask, self._order)
        _add(self._energy, name, F.rms_norm(x.float(), (x.size(-1),), eps=self._model.config.norm_eps), mask, 2)

    def _see_layer(
        self, index: int, mask: Tensor, inputs: dict[int, Tensor], module: nn.Module, args: tuple[Any, ...], out: Tensor
    ) -> None:
        inputs[index] = args[0]
        start = index - self._block_size + 1
        if start >= 0:
            cosine = F.cosine_similarity(inputs.pop(start).float(), out.float(), dim=-1)  # [b, s]
            self._similarity[start] += (cosine * mask).sum()


def _add(sums: dict[str, Tensor], name: str, x: Tensor, mask: Tensor, order: int) -> None:
    """To the sums over tokens of |x| ** order, [channels]."""
    norm = torch.linalg.vector_norm(x * mask[..., None], order, dim=(0, 1), dtype=torch.float32)
    sums[name] = sums.get(name, 0) + norm**order


def read_tokens(labels: Tensor) -> Tensor:
    """[b, s] bool: the positions of a batch that are no padding, which is what follows a row's last label."""
    return (labels != IGNORE).flip(1).cumsum(1).flip(1) > 0


@contextmanager
def without_layers(model: Decoder, start: int, count: int) -> Iterator[None]:
    """Within, `count` layers from `start` on hand on what they get."""
    layers = model.model.layers
    left_out = list(layers)[start : start + count]
    for index in range(start, start + count):
        layers[index] = _Nothing()
    try:
        yield
    finally:
        for index, layer in enumerate(left_out, start):
            layers[index] = layer


class _Nothing(nn.Module):
    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


def choose_layers(scores: Tensor, total: int, count: int) -> list[int]:
    """The layers that stay.

    Args:
        scores: [n] of each layer; of blocks, [total - size + 1], of each by its first layer.
        total: layers of the whole model.
        count: how many stay; without any of the blocks so many do.
    """
    size = total - len(scores) + 1
    if size > 1:
        assert size == total - count
        first = int(scores.argmin())
        return [index for index in range(total) if not first <= index < first + size]
    return _largest(scores, count).tolist()


def choose_width(statistics: Statistics, config: ModelConfig, target: ModelConfig, layers: list[int]) -> Kept:
    """What stays of a model whose `config` is to become `target` in width, and of which `layers` stay."""
    hidden = mlp = heads = None
    if target.intermediate_size < config.intermediate_size:
        mlp = _largest(statistics.mlp_channels(), target.intermediate_size)
    if target.num_heads < config.num_heads:
        heads = _choose_heads(statistics.heads(), config.num_kv_heads, target)
    if target.hidden_size < config.hidden_size:
        hidden = _largest(statistics.hidden_channels(), target.hidden_size)
    scales = {} if hidden is None else statistics.norm_scales(hidden)
    return Kept(layers, hidden, mlp, heads, scales)


def _choose_heads(scores: Tensor, num_kv_heads: int, target: ModelConfig) -> Tensor:
    """[layers, heads]: key heads by the sum of the query heads that stay with them."""
    groups = scores.unflatten(-1, (num_kv_heads, -1))  # [layers, key heads, heads of one]
    own = _largest(groups, target.num_heads // target.num_kv_heads)
    key_heads = _largest(groups.gather(-1, own).sum(-1), target.num_kv_heads)[..., None]
    heads = key_heads * groups.size(-1) + own.take_along_dim(key_heads, dim=1)
    return heads.flatten(1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """[..., count] increasing indices of the largest of the last dimension; of equal ones the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
