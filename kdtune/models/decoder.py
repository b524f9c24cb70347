"""The decoder: embedding, layers of attention and gated MLP, norm, head.

Modules are named so that `state_dict()` has the keys of a Hugging Face checkpoint; nothing is converted on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune.documents import Documents
from kdtune.models.attention import Sight, attend, attention_mask, block_causal
from kdtune.models.cache import KVCache
from kdtune.models.checkpointing import CheckpointingMode, Offloader, checkpointer
from kdtune.models.config import ModelConfig
from kdtune.models.rope import Rope, rotate
from kdtune.stage import Stage

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")  # of a layer, as they compute
HEADS = ("self_attn.queries", "self_attn.keys", "self_attn.values")  # what attention makes its output of


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), in float32 or better, rounded before the weight.

    The order of rounding is that of transformers, so that bfloat16 models agree with it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `RMSNorm` says, over the last dimension."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * F.rms_norm(wide, (x.size(-1),), eps=eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        d, n = config.hidden_size, config.head_dim
        self.index = index
        self.head_dim = n
        self.q_proj = nn.Linear(d, config.num_heads * n, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, config.num_kv_heads * n, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, config.num_kv_heads * n, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * n, d, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(n, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(n, config.norm_eps) if config.qk_norm else None
        self.attend: Callable[..., Tensor] = attend  # or what has its arguments, for rows of which only a slice is here

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        sight: Sight,
        cache: KVCache | None,
        seen: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        queries, keys, values = (  # [b, s, h, n]
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if seen is not None:
            queries, keys, values = (seen(name, x) for name, x in zip(HEADS, (queries, keys, values), strict=True))
        queries = rotate(queries.transpose(1, 2), cos, sin)  # [b, h, s, n]
        keys = rotate(keys.transpose(1, 2), cos, sin)
        values = values.transpose(1, 2)
        if cache is None:
            out = self.attend(queries, keys, values, sight)  # [b, h, s, n]
        else:
            out = attend(queries, *cache.store(self.index, keys, values), sight)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.checkpoint: Callable[..., Any] | None = None
        self.compiled: Callable[..., Any] | None = None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight, cache: KVCache | None, wanted: tuple[str, ...] = ()
    ) -> Any:
        """What goes on to the next layer, [b, s, d]; if `PARTS` or `HEADS` are wanted, a tuple with it first."""
        # Not with a cache, which grows with each token: code would be compiled for each length.
        compute = self._keep_less if self.compiled is None or cache is not None else self.compiled
        return compute(x, cos, sin, sight, cache, wanted)

    def _keep_less(
        self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight, cache: KVCache | None, wanted: tuple[str, ...]
    ) -> Any:
        if self.checkpoint is None or not torch.is_grad_enabled():
            return self._forward(x, cos, sin, sight, cache, wanted)
        return self.checkpoint(functools.partial(self._forward, sight=sight, cache=cache, wanted=wanted), x, cos, sin)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight, cache: KVCache | None, wanted: tuple[str, ...]
    ) -> Any:
        # As outputs, not by hooks: so they pass through checkpointing, compiled code and FSDP as any output does.
        found: dict[str, Tensor] = {}

        def seen(part: str, output: Tensor) -> Tensor:
            if part in wanted:
                found[part] = output
            return output

        normed = self.input_layernorm(x)
        watched = (seen,) if wanted else ()
        x = x + seen("self_attn", self.self_attn(seen("input_layernorm", normed), cos, sin, sight, cache, *watched))
        del normed  # as soon as it would go if nobody named it
        x = x + seen("mlp", self.mlp(seen("post_attention_layernorm", self.post_attention_layernorm(x))))
        return (x, *(found[part] for part in wanted)) if wanted else x


class Trunk(nn.Module):
    """All but the head; the `model.` of parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rope = Rope(config.rope, config.head_dim)
        self.is_random = False  # whether layers draw random numbers: whoever gives them dropout says so
        self.is_rounded = False  # whether layers round their weights, for a model of few bits
        self.offload_activations = False
        self.slice, self.num_slices = 0, 1  # which of the rows' equal slices it gets, unless there is a cache

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Documents | None,
        cache: KVCache | None,
        captured: dict[str, Tensor | None] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As `Decoder.hidden_states`, which finds in `captured` what the modules that are its keys have put out."""
        captured, given = captured or {}, given or {}

        def passed(name: str, output: Tensor) -> Tensor:
            if name in captured:
                captured[name] = output
            if name not in given:
                return output
            assert output.shape == given[name].shape, f"{list(given[name].shape)} for {name}, {list(output.shape)}"
            return _Start.apply(
                output.new_zeros((), requires_grad=torch.is_grad_enabled()), given[name].to(output.dtype)
            )

        x = passed("model.embed_tokens", self.embed_tokens(tokens))  # [b, s, d]
        num_slices, begin = (self.num_slices, self.slice * tokens.size(1)) if cache is None else (1, 0)
        here = slice(begin, begin + tokens.size(1))
        index = torch.arange(num_slices * tokens.size(1), device=tokens.device)[None]  # [1, s] of whole rows
        decoding = cache is not None and cache.length > 0
        if cache is not None:
            cache.begin(tokens.size(1), positions)
        queries = slots = index
        if decoding:
            assert cache is not None
            assert positions is not None
            assert documents is None
            queries, slots = positions, torch.arange(cache.length, device=tokens.device)[None]
        # Once for all layers of a kind, whose masks the backward then shares.
        sights: dict[int | None, Sight] = {
            window: attention_mask(queries, slots, window, causal=not decoding, dtype=x.dtype)
            if documents is None
            else block_causal(documents, window, x, self.config.head_dim)
            for window in set(self.config.windows)
        }
        if positions is None:
            positions = (index if documents is None else documents.positions())[:, here]
        lengths = None
        if self.config.rope.type == "dynamic":
            lengths = positions.amax(dim=1, keepdim=True).expand_as(positions) + 1 + index.size(1) - here.stop
            lengths = lengths if documents is None else documents.lengths_of_tokens()[:, here]
        cos, sin = (part.to(x.dtype)[:, None] for part in self.rope(positions, lengths))  # [b, 1, s, n]
        offloader = Offloader() if self.offload_activations and torch.is_grad_enabled() else None
        for number, (layer, window) in enumerate(zip(self.layers, self.config.windows, strict=True)):
            name = f"model.layers.{number}"
            wanted = tuple(part for part in (*PARTS, *HEADS) if f"{name}.{part}" in captured) if captured else ()
            with offloader.keep(x, is_last=layer is self.layers[-1]) if offloader else nullcontext():
                x = layer(x, cos, sin, sights[window], cache, wanted)
            if wanted:
                x, *parts = x
                captured.update((f"{name}.{part}", output) for part, output in zip(wanted, parts, strict=True))
            x = passed(name, x)
        return passed("model.norm", self.norm(x))


class _Start(torch.autograd.Function):
    """A tensor at which a graph begins, and which wants a gradient, though nobody needs it.

    FSDP lets go of a layer's weights, and adds their gradients up, once the layer's input has had its own.
    """

    @staticmethod
    def forward(ctx: Any, graph: Tensor, given: Tensor) -> Tensor:
        return given

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _embedding(config: ModelConfig) -> nn.Embedding:
    # nn.Embedding's own `normal_` imports sympy on `meta`: 1.2 s and 80 MB (torch 2.13).
    weight = torch.empty(config.vocab_size, config.hidden_size)
    if not weight.is_meta:
        nn.init.normal_(weight, std=config.initializer_range)
    return nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)


class Decoder(nn.Module):
    """A causal language model of any of the families in `families.py`.

    Built by itself it has PyTorch's own random weights; `kdtune.checkpoint.load_model` builds it on `meta` and fills it
    from a folder or with seeded random numbers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.stage: Stage | None = None  # which of its layers are here, if a pipeline has it
        self.compute_device: torch.device | None = None  # to which its weights come; None: they are there
        self.beside: Any = None  # a module what is trained with it and is no part of it: see `trained_parameters`

    def in_checkpoint(self, name: str) -> str:
        """A parameter's name in a checkpoint, where a tied weight is once; the last stage of a pipeline has it too."""
        is_tied = name == "lm_head.weight" and self.config.tie_embeddings
        return "model.embed_tokens.weight" if is_tied else name

    @property
    def head(self) -> nn.Linear:
        """From hidden states [..., d] to logits [..., v]; `.weight` is [v, d], the embedding itself if tied."""
        return self.lm_head

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.compute_device or self.head.weight.device

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; `head` makes logits of them.

        Args:
            tokens: [b, s], int64.
            positions: [b, s], counted from 0 in each document. None: counted from `documents`.
            documents: of the rows, on the device of `tokens`; none sees another. None: a row is one document, which
                suits right padding too, since no token sees what comes after it. (With dynamic rope, padding then
                counts as length.)
            cache: what earlier calls left, for generation; it is updated. The first call takes rows padded on the
                right and no `positions`; later ones need `positions` and take no `documents`.

        Returns:
            [b, s, d], in the weights' dtype.
        """
        return self.model(tokens, positions, documents, cache)

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        wanted: Collection[str] = (),
        given: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `hidden` returns, and what some modules put out on the way.

        Args:
            tokens: [b, s], int64.
            positions: as for `hidden`.
            documents: as for `hidden`.
            wanted: names of modules, of those in `module_names` and `head_names`.
            given: by the name of the embedding, of a layer or of the last norm what goes on from there in place of what
                it puts out, of the same shape. No gradient passes.

        Returns:
            [b, s, d]; and by name [b, s, d] of each wanted module, or [b, s, h, n] of heads. Of a model that is split
            over a tensor-parallel group modules give the positions of this rank, [b, ceil(s / n), d], of which the last
            may be padding, and heads are those of this rank.
        """
        captured: dict[str, Tensor | None] = dict.fromkeys(wanted)
        hidden = self.model(tokens, positions, documents, None, captured, given)
        found = {name: output for name, output in captured.items() if output is not None}
        assert len(found) == len(captured), f"of {list(captured)} there are {list(found)}"
        return hidden, found

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [b, s, v] in the weights' dtype; arguments as for `hidden`."""
        return self.head(self.hidden(tokens, positions, documents, cache))


def enable_activation_checkpointing(model: Decoder, mode: CheckpointingMode = "full", offload: bool = False) -> None:
    """Keep less of each layer for the backward, and compute it again there.

    Args:
        model: with its dropout, if it is to have any.
        mode: `full` keeps a layer's input, `selective` also what its matrix products and attention gave.
        offload: keep the inputs in host memory; for `full` on an accelerator.
    """
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.checkpoint = checkpointer(mode, model.model.is_random)
    model.model.offload_activations = offload


def compile_layers(model: Decoder, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have torch.compile make code for the layers: for all that are alike at once, and for any number of tokens.

    Args:
        model: in its last form: with adapters, quantised, with activation checkpointing. On `meta`, where a run is
            planned, it stays as it is.
        backend: of torch.compile.
    """
    if model.head.weight.is_meta:
        return
    from torch._dynamo import config

    # Of all layers of both models together, with and without gradients, of several rows and of one.
    config.recompile_limit = max(config.recompile_limit, 32)
    config.specialize_float = True  # the eps of norms does not change
    # Inductor leaves roundings to bf16 out. Weights would be rounded to other integers than those that are saved.
    options: dict[str, Any] | None = (
        {"emulate_precision_casts": True} if model.model.is_rounded and backend == "inductor" else None
    )
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.compiled = torch.compile(layer._keep_less, dynamic=True, backend=backend, options=options)


def module_names(config: ModelConfig) -> list[str]:
    """Modules of which `Decoder.hidden_states` gives the output, as they compute; a layer's own is that after its MLP.

    All are [b, s, d].
    """
    layers = [f"model.layers.{index}" for index in range(config.num_layers)]
    parts = [name for layer in layers for name in (*(f"{layer}.{part}" for part in PARTS), layer)]
    return ["model.embed_tokens", *parts, "model.norm"]


def head_names(config: ModelConfig) -> dict[str, int]:
    """What else `Decoder.hidden_states` gives, [b, s, h, n], with its numbers of a token, h n.

    Queries, keys and values of each layer, behind their norms, if it has these, and before they are rotated.
    """
    sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return {
        f"model.layers.{index}.{name}": count * config.head_dim
        for index in range(config.num_layers)
        for name, count in zip(HEADS, sizes, strict=True)
    }


@functools.cache
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every parameter, as in a checkpoint; a tied head is not listed. Builds no weights."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def num_parameters(config: ModelConfig) -> int:
    """How many weights a model has, a tied head counted once. Builds no weights."""
    return sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
