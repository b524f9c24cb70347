"""What layers keep for their backward: everything, the results of products, or their input, here or on the host."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CheckpointingMode = Literal["full", "selective"]


def check_checkpointing(enabled: bool, mode: CheckpointingMode, offload: bool, device: torch.device) -> None:
    """Refuse settings of activation checkpointing that would change nothing.

    Raises:
        ValueError: says which.
    """
    if mode == "selective" and not enabled:
        raise ValueError(
            "activation_checkpointing_mode=selective says which activations are kept, but with "
            "enable_activation_checkpointing=false all are. Set enable_activation_checkpointing=true as well."
        )
    if offload and device.type == "cpu":
        raise ValueError(
            "enable_activation_offloading=true moves activations from the device to the host's memory, and device=cpu "
            "computes there. Leave it out."
        )
    if offload and not (enabled and mode == "full"):
        raise ValueError(
            "enable_activation_offloading=true moves what checkpointed layers keep, their input; everything else would "
            "take longer to move than to compute again. Set enable_activation_checkpointing=true and "
            "activation_checkpointing_mode=full as well."
        )


def checkpointer(mode: CheckpointingMode, is_random: bool) -> Callable[..., Tensor]:
    """A function that computes `function(*args)` and keeps less of it for the backward.

    Args:
        mode: `full` keeps the arguments and computes everything a second time; `selective` also keeps what matrix
            products and attention gave, and repeats norms, rotations and activation functions.
        is_random: the function draws random numbers, which are to be the same the second time.
    """
    contexts: dict[str, Any] = {"context_fn": _keep_products} if mode == "selective" else {}
    return functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=is_random, **contexts)


def _keep_products() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # In these namespaces are the kernels of packed rows, torch's and `kdtune.models.varlen`.
    is_product = operator in _PRODUCTS or operator.namespace in ("torch_attn", "kdtune")
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


_aten = torch.ops.aten
# Not `bmm`: it appears only where there is no kernel for attention, and gives the scores, [b, h, s, s].
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}


class Offloader:
    """Host memory for the inputs of layers, in one pass through them, from their forward to their backward.

    The copies run beside the computation, on a stream of their own: an input leaves while its layer is computed, and
    comes back while the layer behind it is in its backward.
    """

    def __init__(self) -> None:
        self._last: _Away | None = None

    def keep(self, x: Tensor, *, is_last: bool) -> saved_tensors_hooks:
        """The context to compute a layer in: what it keeps of its input is a copy in host memory.

        Args:
            x: the input; other tensors that are kept, such as parameters, stay where they are.
            is_last: no layer follows, so that the input is needed again at once, and stays as well.
        """
        before = self._last
        if before is not None:
            before.leave()
        away = self._last = None if is_last else _Away(x)
        reference = weakref.ref(x)  # the hooks live as long as what they pack

        def pack(tensor: Tensor) -> Tensor | _Away:
            return away if away is not None and tensor is reference() else tensor

        def unpack(packed: Tensor | _Away) -> Tensor:
            tensor = packed.get() if isinstance(packed, _Away) else packed
            if before is not None:
                before.fetch()
            return tensor

        return saved_tensors_hooks(pack, unpack)


_WITHOUT_STREAMS = ("cpu", "meta")  # meta: of a plan


class _Away:
    """The input of a layer, wherever it is.

    Its memory on the device is taken and given back in the order of the computation, which waits for the copies: so it
    is never held for longer than a layer, however far ahead of the device the host is.
    """

    def __init__(self, x: Tensor) -> None:
        self._x: Tensor | None = x.detach()
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type not in _WITHOUT_STREAMS)
        self._copied = self._copy(self._host, self._x)

    def leave(self) -> None:
        """Give the memory on the device back, for what is computed from now on."""
        self._wait()
        self._x = None

    def fetch(self) -> None:
        """Set out for the device, if not on the way yet."""
        if self._x is None:
            self._x = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._copy(self._x, self._host)

    def get(self) -> Tensor:
        """The input on the device, for its layer's backward, which then holds it alone."""
        self.fetch()
        self._wait()
        x, self._x = self._x, None
        assert x is not None
        return x

    def _copy(self, target: Tensor, source: Tensor) -> torch.Event | None:
        if self._device.type in _WITHOUT_STREAMS:
            target.copy_(source)
            return None
        stream = _side_stream(self._device)
        # The source may not be computed yet, and the memory of the target may still be read for something else.
        stream.wait_stream(torch.accelerator.current_stream(self._device))
        with stream:
            target.copy_(source, non_blocking=True)
        return stream.record_event()

    def _wait(self) -> None:
        if self._copied is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._copied)


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)
