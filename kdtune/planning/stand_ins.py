"""What lets a step run on tensors without data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import FakeTensorMode

from kdtune.data import Batch
from kdtune.losses import SampledTargets, Targets, TopKTargets, chunked
from kdtune.models import quantization
from kdtune.optim import adamw, moments
from kdtune.optim.adamw import blocks
from kdtune.planning import kernels
from kdtune.teacher import CachedTeacher

aten = torch.ops.aten


Compute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_SMALL = 16 * 2**20  # bytes


@contextmanager
def without_data(host: bool) -> Iterator[tuple[Compute, list[float]]]:
    """Make tensors without data: on `meta`, which stands for a GPU, whichever is meant, and on the CPU if asked.

    Args:
        host: also on the CPU, which stands for itself. It triples the time, so it is for where the CPU has a part.

    Yields:
        How an operator is carried out, see `Tracker`.
        In the end, the shares of the labelled positions that the loss has looked at.
    """
    shares: list[float] = []
    all_chunks = chunked.chunks

    def first_chunks(scored: Tensor, size: int) -> Sequence[Tensor]:
        chunks = all_chunks(scored, size)[:2]
        if chunks:
            shares.append(sum(map(len, chunks)) / len(scored))
        return chunks

    def first_blocks(tensors: list[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
        return itertools.islice(blocks(tensors, size), 2)  # while the second is made, the first is still held

    with ExitStack() as stack:
        stack.enter_context(replaced(chunked, "chunks", first_chunks))
        stack.enter_context(replaced(chunked, "is_sum_over_entries", lambda *_: True))  # which only data tells
        stack.enter_context(replaced(adamw, "blocks", first_blocks))
        stack.enter_context(replaced(CachedTeacher, "__call__", _answers))
        stack.enter_context(replaced(quantization, "quantize", _once_for_each_shape(quantization.quantize)))
        # What is kept from one step to the next has no data either, and must not outlive the plan.
        stack.enter_context(replaced(moments, "table", functools.cache(moments.table.__wrapped__)))
        for name, stand_in in (("scaled_dot_product_attention", kernels.attention), ("rms_norm", kernels.rms_norm)):
            stack.enter_context(replaced(F, name, _on_meta(stand_in, getattr(F, name))))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if host:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(replaced(torch.utils, "swap_tensors", _swap_forgotten(mode)))
        yield _compute if host else _compute_beside_host, shares


def _answers(
    teacher: CachedTeacher, batch: Batch, wanted: Collection[str] = ()
) -> Targets | TopKTargets | SampledTargets:
    """As many as there can be."""
    store, device = teacher.cache.card.store, teacher.device
    t = batch.labels.numel() if batch.scored is None else len(batch.scored)
    if teacher.head is not None:
        dtype = torch.bfloat16 if store.hidden_dtype == "bf16" else torch.float32
        hidden = torch.empty(t, teacher.head.in_features, dtype=dtype, device=device)
        return Targets(hidden, teacher.head, dict.fromkeys(wanted, hidden))
    k = store.top_k if store.kind == "top_k" else store.num_samples + 1
    ids = torch.empty(t, k, dtype=torch.int64, device=device)
    values, of_tokens = (torch.empty(shape, device=device) for shape in ((t, k), (t,)))
    if store.kind == "samples":
        return SampledTargets(ids, values, of_tokens)
    return TopKTargets(ids, values, of_tokens, convention=teacher.convention)


def _swap_forgotten(mode: FakeTensorMode) -> Callable[..., None]:
    """torch.utils.swap_tensors, by which a module changes what its weights are. It refuses a tensor that is known."""
    swap = torch.utils.swap_tensors

    def call(*pair: Tensor) -> None:
        mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap(*pair)

    return call


def _once_for_each_shape(quantize: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """Layers are alike, and rounding one to nf4 takes a thousand operators."""
    made: dict[Any, Any] = {}

    def like_the_first(weight: Tensor, kind: Any) -> Tensor:
        key = weight.shape, weight.dtype, weight.device, kind
        if key not in made:
            return made.setdefault(key, quantize(weight, kind))
        names, context = made[key].__tensor_flatten__()
        parts = {name: torch.empty_like(getattr(made[key], name)) for name in names}
        return type(made[key]).__tensor_unflatten__(parts, context, weight.shape, weight.stride())

    return like_the_first


class HostHasAPart(Exception):
    """The CPU is given tensors that are better made without data."""


def _compute_beside_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    is_on_host = bool(args) and isinstance(args[0], Tensor) and args[0].is_cpu
    out = func(*args, **kwargs) if is_on_host else _compute(func, args, kwargs)
    if isinstance(out, Tensor) and out.is_cpu and out.nbytes > _SMALL:
        raise HostHasAPart
    return out


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out an operator on tensors without data.

    What only data tells is answered by what takes most. What would change nothing but data is left out, for the time.
    """
    if func is torch.ops.prim.device.default:
        return args[0].fake_device
    if func.namespace == "c10d":  # the other processes have nothing to say
        at_once: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        at_once.set_result([])
        done = _create_work_from_future(at_once).boxed()
        return done if len(func._schema.returns) == 1 else (args[0], done)
    if "out" in kwargs:
        return kwargs["out"] if func._schema.returns else None
    if _changes_data_alone(func):
        return args[0] if func._schema.returns else None
    if func is aten.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
    if func is aten._pin_memory.default:  # host memory to and from which a GPU copies by itself
        return torch.empty_like(args[0])
    if func is aten._local_scalar_dense.default:
        return 1.0 if args[0].dtype.is_floating_point else 1
    if func is aten.index.Tensor:
        args = args[0], [index for mask in args[1] for index in _indices(mask)]
    return func(*args, **kwargs)


def _on_meta(stand_in: Callable[..., Tensor], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Not a TorchFunctionMode: within a backward, where layers may be computed again, none is active.
    def call(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (stand_in if input.is_meta else function)(input, *args, **kwargs)

    return call


@functools.cache
def _changes_data_alone(func: Any) -> bool:
    """Whether it writes into its first argument and does no more."""
    if not func._schema.arguments or torch.Tag.inplace_view in func.tags or func._schema.name in _RESIZING:
        return False
    first, returns = func._schema.arguments[0], func._schema.returns
    is_written = first.alias_info is not None and first.alias_info.is_write
    return is_written and all(result.alias_info is not None for result in returns)


_RESIZING = ("aten::resize_", "aten::resize_as_", "aten::set_")


def _indices(mask: Tensor | None) -> list[Tensor | None]:
    """A mask is an index of as many dimensions as it has, with all of its elements."""
    if mask is None or mask.dtype not in (torch.bool, torch.uint8):
        return [mask]
    return [mask.new_empty(mask.numel(), dtype=torch.int64) for _ in range(mask.dim())]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute be another, or be there, while this is entered."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)
