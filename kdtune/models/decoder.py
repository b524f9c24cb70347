"""The decoder: embedding, layers of attention and gated MLP, norm, head.

Modules are named so that `state_dict()` has the keys of a Hugging Face checkpoint; nothing is converted on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdtune.models.cache import KVCache
from kdtune.models.config import ModelConfig
from kdtune.models.rope import Rope, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), in float32 or better, rounded before the weight.

    The order of rounding is that of transformers, so that bfloat16 models agree with it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, (x.size(-1),), eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        d, n = config.hidden_size, config.head_dim
        self.index = index
        self.head_dim = n
        self.group_size = config.num_heads // config.num_kv_heads  # query heads that share a key head
        self.q_proj = nn.Linear(d, config.num_heads * n, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, config.num_kv_heads * n, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, config.num_kv_heads * n, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * n, d, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(n, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(n, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        queries, keys, values = (  # [b, s, h, n]
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = rotate(queries.transpose(1, 2), cos, sin)  # [b, h, s, n]
        keys = rotate(keys.transpose(1, 2), cos, sin)
        values = values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.store(self.index, keys, values)
        # On CUDA, kernels that take fewer key heads know no mask and no float32; what then remains holds [b, h, s, s]
        # (torch 2.13). Repeated heads open the memory-efficient kernel again.
        native = mask is None and (queries.dtype in (torch.bfloat16, torch.float16) or not queries.is_cuda)
        if not native and self.group_size > 1:
            keys, values = (heads.repeat_interleave(self.group_size, dim=1) for heads in (keys, values))
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=native and self.group_size > 1
        )  # [b, h, s, n]
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """All but the head; the `model.` of parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rope = Rope(config.rope, config.head_dim)
        self.activation_checkpointing = False

    def forward(
        self, tokens: Tensor, positions: Tensor | None, documents: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        s, device = tokens.size(1), tokens.device
        index = torch.arange(s, device=device)[None]  # [1, s]
        decoding = cache is not None and cache.length > 0
        if cache is not None:
            cache.begin(s, positions)
        if decoding:
            assert cache is not None
            assert positions is not None
            assert documents is None
            queries, slots = positions, torch.arange(cache.length, device=device)[None]
        else:
            queries, slots = index, index
        masks = {
            window: attention_mask(queries, slots, documents, window, causal=not decoding)
            for window in set(self.config.windows)
        }
        if positions is None:
            positions = index if documents is None else document_positions(documents)

        x = self.embed_tokens(tokens)  # [b, s, d]
        lengths = document_lengths(positions, documents) if self.config.rope.type == "dynamic" else None
        cos, sin = (part.to(x.dtype)[:, None] for part in self.rope(positions, lengths))  # [b, 1, s, n]
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Nothing in a layer is random, so there is no random state to keep.
                x = checkpoint(layer, x, cos, sin, masks[window], cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, masks[window], cache)
        return self.norm(x)


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

    @property
    def head(self) -> nn.Linear:
        """From hidden states [..., d] to logits [..., v]; `.weight` is [v, d], the embedding itself if tied."""
        return self.lm_head

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; `head` makes logits of them.

        Args:
            tokens: [b, s], int64.
            positions: [b, s], counted from 0 in each document. None: counted from `documents`.
            documents: [b, s], int: a token sees earlier tokens of the same id; -1 is padding. None: a row is one
                document, which takes the fastest attention and suits right padding too, since no token sees what
                comes after it. (With dynamic rope, padding then counts as length.)
            cache: what earlier calls left, for generation; it is updated. The first call takes rows padded on the
                right and no `positions`; later ones need `positions` and take no `documents`.

        Returns:
            [b, s, d], in the weights' dtype.
        """
        return self.model(tokens, positions, documents, cache)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [b, s, v] in the weights' dtype; arguments as for `hidden`."""
        return self.head(self.hidden(tokens, positions, documents, cache))


def attention_mask(
    queries: Tensor, keys: Tensor, documents: Tensor | None, window: int | None, *, causal: bool
) -> Tensor | None:
    """Which key each query may see.

    Args:
        queries: [b, q] or [1, q], index of each query in its row.
        keys: [1, k], index of each key.
        documents: [b, s] if queries and keys are the same tokens of several documents.
        window: how far back a query sees, itself included.
        causal: queries and keys are the same tokens, so that None can stand for the plain causal mask.

    Returns:
        bool, [b, 1, q, k] or [1, 1, q, k], True where a query may look; every query sees itself. None: plain causal.
    """
    if window is not None and window >= keys.size(1):
        window = None
    if causal and documents is None and window is None:
        return None
    distance = queries[:, :, None] - keys[:, None, :]  # [b, q, k]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    return allowed[:, None]


def document_positions(documents: Tensor) -> Tensor:
    """Positions [b, s] counted from the start of each run of equal ids."""
    index = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def document_lengths(positions: Tensor, documents: Tensor | None) -> Tensor:
    """How long the document of each token is, [b, s]: one more than its last position."""
    if documents is None:
        return positions.amax(dim=1, keepdim=True).expand_as(positions) + 1
    same = documents[:, :, None] == documents[:, None, :]  # [b, s, s]
    return torch.where(same, positions[:, None, :], 0).amax(dim=2) + 1


def enable_activation_checkpointing(model: Decoder) -> None:
    """Keep only each layer's input for the backward pass and compute the layer again there."""
    model.model.activation_checkpointing = True


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, as in a checkpoint; a tied head is not listed. Builds no weights."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def num_parameters(config: ModelConfig) -> int:
    """How many weights a model has, a tied head counted once. Builds no weights."""
    return sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
