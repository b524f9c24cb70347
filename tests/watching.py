"""Modes that watch what torch computes: which operators, and whose memory lives on."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
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
