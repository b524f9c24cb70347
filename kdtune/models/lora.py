"""Low-rank adapters: a transform of a model after which two thin matrices beside each weight are trained in its place.

    y = x (W + scale B A)^T + b         LoRA: W [o, i] is frozen, A [r, i] and B [o, r] are trained
    y = x (m V / |V|)^T + b             DoRA: V = W + scale B A, |V| the length of each row, m [o] trained, too

Parameters keep their names: a weight that gets an adapter is where it was, and A and B are `lora_A.weight` and
`lora_B.weight` beside it, as PEFT calls them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune.config import setting
from kdtune.dtensors import held, like, local, whole
from kdtune.models.config import ModelConfig
from kdtune.models.decoder import Decoder
from kdtune.models.quantization import Quantization, dequantize, frozen_linear, is_quantized, quantized_shapes

ALL_LINEAR = "all-linear"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_LEAST = 1e-30  # of a row's squared length: rows of zeros stay zeros


@dataclass
class LoraConfig:
    """Train a low-rank change of frozen weights (Hu et al. 2021, "LoRA", arXiv:2106.09685) instead of the weights."""

    rank: int = setting(16, gt=0)  # r: rows of A, columns of B
    alpha: float = setting(32.0, gt=0)  # the change is alpha / rank * B A
    dropout: float = setting(0.0, ge=0, lt=1)  # share of what goes into A that is left out in training
    use_rslora: bool = False  # alpha / sqrt(rank) instead, for large ranks (Kalajdzievski 2023, arXiv:2312.03732)
    use_dora: bool = False  # train the length of each row of a weight, too: DoRA (Liu et al. 2024, arXiv:2402.09353)
    # Which layers: the end of their names (q_proj, embed_tokens), or a regular expression of the whole name;
    # all-linear: every linear layer but the head.
    target_modules: list[str] = setting([ALL_LINEAR])
    modules_to_save: list[str] = setting([])  # modules that are trained whole, named likewise: [embed_tokens]
    base_quantization: Quantization | None = None  # few bits for the frozen weights: QLoRA with nf4; null: dtype
    start_from: str | None = setting(None, path=True)  # folder of an adapter to train further; null: a new one
    save_merged: bool = False  # also write output_dir/model, a whole model with the change in its weights

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoraLinear(nn.Linear):
    """A frozen linear layer with an adapter.

    A and B are float32 also beside a bf16 weight, since their steps are small; they are multiplied in the type of what
    comes in.
    """

    def __init__(self, base: nn.Linear, lora_A: nn.Linear, lora_B: nn.Linear, cfg: LoraConfig) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make another weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scale, self.dropout = cfg.scale, cfg.dropout
        self.lora_magnitude_vector: nn.Parameter | None = None
        if cfg.use_dora:
            self.square_lengths: Tensor  # of the rows of the frozen weight, all of them on every process
            lengths = lora_B.weight.new_empty(self.out_features)
            self.register_buffer("square_lengths", lengths, persistent=False)
            self.lora_magnitude_vector = nn.Parameter(lengths.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = _add_product(frozen_linear(x, self.weight, self.bias), self.down(x), self.lora_B.weight)
        if self.lora_magnitude_vector is None:
            return y
        # As a change of y, which is 0 in the beginning, and in float32: in bf16 there is nothing between 1 and 1.008.
        growth = self.lora_magnitude_vector / self.row_lengths() - 1
        return (y + (y if self.bias is None else y - self.bias) * growth).to(x.dtype)

    def down(self, x: Tensor) -> Tensor:
        """scale * A x, with dropout in training: [..., r]."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scale

    def factors(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The products that the logits are made of, if this is the head (see `kdtune.losses.Projection`)."""
        return [(hidden, self.weight), (self.down(hidden), self.lora_B.weight.to(hidden.dtype))]

    @torch.no_grad()
    def measure(self) -> None:
        """Take the lengths that the rows of the frozen weight have as they are now (DoRA)."""
        if self.lora_magnitude_vector is not None:
            squares = _wide(local(self.weight)).square().sum(1)
            local(self.lora_magnitude_vector).copy_(squares.sqrt())
            lengths = whole(like(self.lora_magnitude_vector, squares))
            self.square_lengths = lengths.to(self.square_lengths.device)

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """|W + scale B A| of each row, [o], a constant for the backward (DoRA, section 4.3).

        From |w|^2 + 2 w.d + |d|^2, so that nothing of the weight's size is made.
        """
        a, b = self.lora_A.weight, self.lora_B.weight * self.scale
        products = frozen_linear(a.to(self.weight.dtype), self.weight).T.to(a.dtype)  # W A^T, [o, r]
        squares = self.square_lengths + 2 * (products * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
        return squares.clamp(min=_LEAST).sqrt()


class LoraEmbedding(nn.Embedding):
    """A frozen embedding with an adapter. Nothing is dropped from ids, as in PEFT."""

    def __init__(self, base: nn.Embedding, lora_A: nn.Linear, lora_B: nn.Linear, cfg: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.weight = base.weight
        self.lora_A, self.lora_B = lora_A, lora_B  # weights [r, d] and [v, r]
        self.scale = cfg.scale

    def forward(self, tokens: Tensor) -> Tensor:
        change = F.embedding(tokens, self.lora_B.weight) * self.scale  # [b, s, r]
        x = F.embedding(tokens, self.weight)
        return _add_product(x, change.to(x.dtype), self.lora_A.weight.T)


def add_lora(model: Decoder, cfg: LoraConfig, *, seed: int) -> None:
    """Freeze a model and give it adapters, which change nothing yet: B is 0.

    A is uniform within 1 / sqrt(i), as in PEFT, also beside embeddings (where PEFT draws from a standard normal, with
    which the first steps are as large as the embeddings). The adapter of a tied embedding is that of the head, too, so
    that they stay tied.

    Args:
        model: of any family, on any device, quantised or not.
        cfg: which adapters.
        seed: of A; the same numbers on any device, and no global random state is touched.

    Raises:
        ValueError: a name that no layer has, a rank above what a layer has, or DoRA where it cannot be.
    """
    adapted, whole = _selected(model, cfg)
    model.requires_grad_(False)
    for name in whole:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(True)
    for name in adapted:
        base, embedding = model.get_submodule(name), model.model.embed_tokens
        if isinstance(base, nn.Embedding):
            adapter: nn.Module = LoraEmbedding(base, *_new_adapter(base.weight, cfg.rank), cfg)
        elif name == HEAD and model.config.tie_embeddings and isinstance(embedding, LoraEmbedding):
            adapter = LoraLinear(model.head, embedding.lora_A, embedding.lora_B, cfg)
        else:
            assert isinstance(base, nn.Linear)
            adapter = LoraLinear(base, *_new_adapter(base.weight, cfg.rank), cfg)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, adapter)
    model.model.is_random = cfg.dropout > 0
    init_lora(model, seed=seed)


@torch.no_grad()
def init_lora(model: Decoder, *, seed: int) -> None:
    """Give new adapters their numbers, once the weights beside them have theirs.

    Args:
        model: with adapters, held by this process, or by several together, which then all call.
        seed: as of `add_lora`.
    """
    generator = torch.Generator().manual_seed(seed)
    shared: set[nn.Module] = set()  # of a tied embedding, with the head
    for module in model.modules():
        if isinstance(module, (LoraLinear, LoraEmbedding)) and module.lora_A not in shared:
            shared.add(module.lora_A)
            a, bound = module.lora_A.weight, 1 / math.sqrt(module.lora_A.in_features)
            if not a.is_meta:  # drawn as a whole on the host, so that every device and process has the same numbers
                drawn = torch.empty(a.shape, dtype=a.dtype).uniform_(-bound, bound, generator=generator)
                local(a).copy_(drawn[held(a)])
            local(module.lora_B.weight).zero_()
        if isinstance(module, LoraLinear):
            module.measure()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a model, by name: of one with adapters, these and the modules that are trained whole.

    What `Decoder.beside` holds is not.
    """
    named = ((name, parameter) for name, parameter in model.named_parameters() if not name.startswith("beside."))
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def trained_shapes(config: ModelConfig, cfg: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of what `add_lora` leaves to be trained. Builds no weights.

    Raises:
        ValueError: as `add_lora`.
    """
    with torch.device("meta"):
        model = Decoder(config)
        add_lora(model, cfg, seed=0)
    return {name: tuple(parameter.shape) for name, parameter in trained_parameters(model).items()}


@torch.no_grad()
def merged(model: Decoder, name: str, master: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
    """A parameter of the model without adapters, in float32 with the change of its adapter, or as it is if it has none.

    What is saved of all of them is a model without adapters that does what this one does.

    Args:
        model: with adapters or without.
        name: of the parameter.
        master: what to take for a parameter that has no adapter.
    """
    module = model.get_submodule(name.rpartition(".")[0])
    if not name.endswith(".weight") or not isinstance(module, (LoraLinear, LoraEmbedding)):
        parameter = model.get_parameter(name)
        return dequantize(parameter) if is_quantized(parameter) else master(parameter)
    weight = _wide(whole(module.weight), copy=True)
    magnitude = module.lora_magnitude_vector if isinstance(module, LoraLinear) else None
    a, b = whole(module.lora_A.weight), whole(module.lora_B.weight)
    merge(weight, a, b, module.scale, None if magnitude is None else whole(magnitude))
    return weight


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None, dim: int = 1) -> None:
    """Put an adapter's change into a weight, in place.

    Args:
        weight: [o, i], as wide as the adapter.
        a: [r, i].
        b: [o, r].
        scale: of their product.
        magnitude: DoRA's lengths along `dim`. None: plain LoRA.
        dim: 1 of a linear layer's rows; 0 of an embedding's columns, as in PEFT.
    """
    weight.addmm_(b, a, alpha=scale)
    if magnitude is not None:
        weight.mul_((magnitude / weight.norm(dim=dim).clamp(min=_LEAST**0.5)).unsqueeze(dim))


def _wide(weight: Tensor, copy: bool = False) -> Tensor:
    """In float32, or float64 if it is that."""
    weight = dequantize(weight) if is_quantized(weight) else weight
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=copy)


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x @ weight.T, in one kernel: [..., o] from [..., o], [..., r] and [o, r]."""
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight.to(x.dtype).T).view_as(y)


def _new_adapter(weight: Tensor, rank: int) -> tuple[nn.Linear, nn.Linear]:
    outputs, inputs = weight.shape
    dtype, device = torch.promote_types(weight.dtype, torch.float32), weight.device
    a, b = (torch.empty(shape, dtype=dtype, device=device) for shape in ((rank, inputs), (outputs, rank)))
    return _linear(a), _linear(b)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # draws no random numbers there
    linear.weight = nn.Parameter(weight)
    return linear


def _selected(model: Decoder, cfg: LoraConfig) -> tuple[list[str], list[str]]:
    """Names of the modules that get an adapter, and of those that are trained whole, each in the model's order."""
    modules = dict(model.named_modules())
    weights = [name for name, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    whole = _found("modules_to_save", cfg.modules_to_save, weights, model)
    matrices = [name for name in weights if isinstance(modules[name], (nn.Linear, nn.Embedding))]
    in_few_bits = {name.removesuffix(".weight") for name in quantized_shapes(model.config)}
    if cfg.base_quantization and (unfit := sorted(whole & in_few_bits)):
        raise ValueError(
            f"lora.modules_to_save has {_some(unfit)}, which lora.base_quantization={cfg.base_quantization} stores in "
            "few bits: no step is large enough to change those. Give it an adapter (lora.target_modules) instead."
        )
    adapted = _found("target_modules", [name for name in cfg.target_modules if name != ALL_LINEAR], matrices, model)
    if both := adapted & whole:
        raise ValueError(
            f"lora.target_modules and lora.modules_to_save both have {_some(sorted(both))}. What is trained whole has "
            "no use for an adapter: leave it out of one of them."
        )
    if ALL_LINEAR in cfg.target_modules:
        linear = {name for name in matrices if isinstance(modules[name], nn.Linear)}
        adapted |= linear - {HEAD} - whole
    if not adapted:
        raise ValueError("lora.target_modules names no layer, so there is no adapter. Name some, or [all-linear].")
    for name in (name for name in matrices if name in adapted):
        shape = tuple(modules[name].get_parameter("weight").shape)
        if cfg.rank > min(shape):
            raise ValueError(
                f"lora.rank={cfg.rank} is above what {name}, {list(shape)}, can have: the change would be no smaller "
                f"than the weight. Use at most {min(shape)}, or leave it out of lora.target_modules."
            )
    if cfg.use_dora and (unfit := sorted(adapted & {EMBEDDING, HEAD})):
        raise ValueError(
            f"lora.use_dora=true is for the linear layers of the decoder, and lora.target_modules has {_some(unfit)}. "
            "Leave it out, train it whole (lora.modules_to_save), or use plain LoRA."
        )
    return [name for name in weights if name in adapted], [name for name in weights if name in whole]


def _found(setting: str, patterns: Sequence[str], names: Sequence[str], model: Decoder) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            matching = {n for n in names if n.endswith(f".{pattern}") or n == pattern or re.fullmatch(pattern, n)}
        except re.error as error:
            raise ValueError(
                f"lora.{setting}: {pattern!r} is neither the end of a name nor a regular expression ({error})."
            ) from None
        if not matching:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
            words = [*ends, ALL_LINEAR] if setting == "target_modules" else ends
            near = difflib.get_close_matches(pattern.rpartition(".")[2], words, 1)
            raise ValueError(
                f"lora.{setting}: the model has no {pattern} that could be trained so. "
                + (f"Did you mean {near[0]}? " if near else "")
                + f"It has {', '.join(ends)}."
            )
        found |= matching
    tied = {EMBEDDING, HEAD}
    return found | tied if model.config.tie_embeddings and found & tied else found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
