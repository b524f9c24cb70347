"""Modes that watch what torch computes: which operators, and whose memory lives on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Operators(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Follows the memory of the tensors that operators return, but for that of a model's parameters.

    Attributes:
        peak: the most bytes that were alive after an operator since it was set to 0; None: not looked for.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self._known = {p.untyped_storage()._cdata for model in models for p in model.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.peak is not None:
            self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes of what is alive."""
        self._seen = {address: seen for address, seen in self._seen.items() if not seen[0].expired()}
        return sum(size for _, size in self._seen.values())


class Waits(TorchDispatchMode):
    """Collects the operators for which the host would wait for `device`: values that it asks for, copies to end."""

    READING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
    COPYING = ("_to_copy", "to", "copy_")

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []
        self._calls = _CopyingCalls(self.found)

    def __enter__(self) -> Waits:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, _, overload = func.name().removeprefix("aten::").partition(".")
        repeats = name == "repeat_interleave" and overload != "self_int" and kwargs.get("output_size") is None
        reads = name in self.READING or repeats
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        tensors = [tensor for tensor in tree_iter((args, out)) if isinstance(tensor, Tensor)]
        copies = name in self.COPYING and len({tensor.device for tensor in tensors}) > 1
        is_waited_for = copies and not _arguments(func, args, kwargs).get("non_blocking")
        if ((reads or by_mask) and tensors[0].device.type == self.device) or is_waited_for:
            self.found.append(func.name())
        return out


class _CopyingCalls(TorchFunctionMode):
    """Collects calls whose copy from the host is no operator."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and not out.is_cpu:
            self._found.append(f"torch.{func.__name__}")
        return out


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By their names."""
    return {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
