"""Bytes of tensors as they come and go: how much a step holds at most, what for, and when."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from kdtune.planning import kernels
from kdtune.planning.processes import sent, tensors
from kdtune.planning.stand_ins import replaced

STUDENT, TEACHER = "student", "teacher"

# What a byte is for.
STUDENT_WEIGHTS = "student weights"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
TEACHER_WEIGHTS = "teacher weights"
GATHERED = "gathered weights"
ACTIVATIONS = "activations"
TEACHER_ACTIVATIONS = "teacher activations"
LOSS = "loss"
TEMPORARY = "temporary"
OTHER = "other"
PARTS = (
    STUDENT_WEIGHTS,
    ADAPTERS,
    GRADIENTS,
    OPTIMIZER,
    TEACHER_WEIGHTS,
    GATHERED,
    ACTIVATIONS,
    TEACHER_ACTIVATIONS,
    LOSS,
    TEMPORARY,
    OTHER,
)
# What FSDP makes, by its own names of what it does.
_OF_FSDP = {
    "FSDP::all_gather": GATHERED,
    "FSDP::all_gather_copy_out": GATHERED,
    "FSDP::post_backward_reshard": GRADIENTS,  # in float32, where they add up over micro-batches
    "FSDP::post_backward_reduce": GRADIENTS,
}


@dataclass
class Peak:
    """The moment at which a device held most."""

    total: int = 0  # bytes
    phase: str = ""  # what was going on
    parts: dict[str, int] = field(default_factory=dict)  # bytes by what they were for


@dataclass
class _Block:
    """A storage that is alive."""

    num_bytes: int
    part: str
    device: torch.device
    watch: weakref.ref[Any]  # gives notice of its end


class Tracker(TorchDispatchMode):
    """Follows every storage that is made while it is entered, from its birth to its end; with data or without.

    What a kernel takes and gives back by itself is not a storage: see `kernels.workspace`.

    Args:
        compute: carries out an operator, as `compute(func, args, kwargs)`.

    Attributes:
        peaks: by device.
        flops: of matrix products, by what they were done for (`student`, `teacher`, which are their bodies, or `heads`)
            and the number format of their factors.
        sent: bytes to other processes, by the kind of collective, what is sent, and the ranks of the group.
    """

    def __init__(self, compute: Callable[..., Any] = lambda func, args, kwargs: func(*args, **kwargs)) -> None:
        super().__init__()
        self._compute = compute
        self.peaks: dict[torch.device, Peak] = defaultdict(Peak)
        self.flops: dict[tuple[str, torch.dtype], float] = defaultdict(float)
        self.sent: dict[tuple[str, str, tuple[int, ...]], float] = defaultdict(float)
        self._blocks: dict[int, _Block] = {}  # by address
        self._held: dict[torch.device, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._roles: dict[int, str] = {}  # of modules, by id
        self._inside: list[str] = []  # roles of the modules that are being called
        self._regions: list[str] = []  # that the profiler would show
        self._phase = "loading"
        self._part = OTHER

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its precaution would cost as much as the rest of a call (torch 2.13)

    def held(self, device: torch.device) -> int:
        """Bytes that are alive."""
        return sum(self._held[device].values())

    def restart(self) -> None:
        """Forget the peaks, the products and the messages so far."""
        self.peaks.clear()
        self.flops.clear()
        self.sent.clear()
        for device in self._held:
            self._look(device)

    @contextmanager
    def during(self, phase: str, part: str) -> Iterator[None]:
        """Name what is going on, and what the storages are for that are made meanwhile by no model and no backward."""
        before = self._phase, self._part
        self._phase, self._part = phase, part
        try:
            yield
        finally:
            self._phase, self._part = before

    @contextmanager
    def following(self, models: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
        """Know the models by their roles: their weights, their gradients, and when they are being called."""
        self._roles = {
            id(module): role for role, roots in models.items() for root in roots for module in root.modules()
        }
        # A head is called by the objective: what it makes is the loss's.
        self._roles |= dict.fromkeys(
            (id(getattr(root, "head", None)) for roots in models.values() for root in roots), ""
        )
        hooks: list[Any] = []
        for module in {module for roots in models.values() for root in roots for module in root.modules()}:
            # Before and after other hooks, which gather what a module takes and gives.
            hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        for role, roots in models.items():
            parameters = [parameter for root in roots for parameter in root.parameters()]
            trainable = [parameter for parameter in parameters if parameter.requires_grad]
            weights = STUDENT_WEIGHTS if role == STUDENT else TEACHER_WEIGHTS
            self.assign([*parameters, *(buffer for root in roots for buffer in root.buffers())], weights)
            if role == STUDENT and len(trainable) < len(parameters):
                self.assign(trainable, ADAPTERS)
            hooks += [parameter.register_post_accumulate_grad_hook(self._take_gradient) for parameter in trainable]
        try:
            with replaced(torch.UntypedStorage, "resize_", self._resize_with(torch.UntypedStorage.resize_)):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                block = self._blocks.get(plain.untyped_storage()._cdata)
                if block is not None:
                    held = self._held[block.device]
                    held[block.part] -= block.num_bytes
                    held[part] += block.num_bytes
                    block.part = part

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(arg) for arg in tensors((args, kwargs))):
            return NotImplemented  # it takes itself apart, and what it does with its parts comes by here
        if _is_composite(func):  # which without autograd comes whole
            with self:
                return func.decompose(*args, **kwargs)
        out = self._compute(func, args, kwargs)
        for tensor in tensors(out):
            self._see(tensor)
        products = kernels.flops(func, args, kwargs, out)
        if products:
            self.flops[self._doing()[2], kernels.factor(func, args).dtype] += products
        if message := sent(func, args, out):
            kind, ranks, num_bytes = message
            self.sent[kind, self._doing()[1], ranks] += num_bytes
        if func.namespace == "profiler":
            self._follow_region(func, args)
        workspace = kernels.workspace(func, args)
        if workspace:
            device = _device(next(tensors(out)))
            held = self._held[device]
            held[TEMPORARY] += workspace
            self._look(device)
            held[TEMPORARY] -= workspace
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._blocks:
            return
        device, part = _device(tensor), self._doing()[1]
        num_bytes = storage.nbytes()
        self._blocks[address] = _Block(num_bytes, part, device, weakref.ref(storage, self._forget(address)))
        self._held[device][part] += num_bytes
        self._look(device)

    def _resize_with(self, resize: Callable[..., None]) -> Callable[..., None]:
        def follow(storage: torch.UntypedStorage, num_bytes: int) -> None:
            """As FSDP does it, which lets the bytes of weights go and keeps their tensors."""
            resize(storage, num_bytes)
            if block := self._blocks.get(storage._cdata):
                self._held[block.device][block.part] += num_bytes - block.num_bytes
                block.num_bytes = num_bytes
                self._look(block.device)

        return follow

    def _follow_region(self, func: Any, args: tuple[Any, ...]) -> None:
        if "enter" in func._schema.name:
            self._regions.append(args[0].split(" ")[0])  # FSDP adds the name of the module
        else:
            self._regions.pop()

    def _forget(self, address: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            block = self._blocks.pop(address)
            self._held[block.device][block.part] -= block.num_bytes

        return forget

    def _look(self, device: torch.device) -> None:
        held = self._held[device]
        total = sum(held.values())
        if total > self.peaks[device].total:
            self.peaks[device] = Peak(total, self._doing()[0], dict(held))

    def _doing(self) -> tuple[str, str, str]:
        """The phase, what storages are for that are born now, and what products are done for."""
        role = self._inside[-1] if self._inside else ""
        if torch._C._current_graph_task_id() != -1:  # within a backward
            # A layer that is called in it computes again what was not kept.
            phase, part, work = "backward", ACTIVATIONS if role == STUDENT else TEMPORARY, STUDENT
        elif role == STUDENT:
            phase, part, work = "student's forward", ACTIVATIONS, STUDENT
        elif role == TEACHER:
            phase, part, work = "teacher's forward", TEACHER_ACTIVATIONS, TEACHER
        else:
            phase, part, work = self._phase, self._part, "heads"
        return phase, _OF_FSDP.get(self._regions[-1], part) if self._regions else part, work

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._inside.append(self._roles[id(module)])

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _take_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.assign([parameter.grad], GRADIENTS)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a quantised or sharded one is made of; itself if it is plain."""
    if is_traceable_wrapper_subclass(tensor):
        for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            if isinstance(part, Tensor):  # not a mesh
                yield from plain_tensors(part)
    else:
        yield tensor


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others, and no kernel."""
    if func is torch.ops.prim.device.default or not func._can_decompose():
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")


def _device(tensor: Tensor) -> torch.device:
    return getattr(tensor, "fake_device", None) or tensor.device
