"""AdamW that chooses how weights are rounded, how moments are kept, where, and when a weight takes its step."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdtune.dtensors import held, is_spread, like, local, norm_of_whole
from kdtune.optim import moments
from kdtune.optim.rounding import join, round_stochastically, split, widen
from kdtune.stage import Stage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Precision = Literal["fp32", "stochastic", "nearest"]
Rounding = Callable[[Tensor, Tensor], object]  # (float32 value, where the rounded one goes)

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign
# Weights that are in float32 at one time: on the CPU what its caches hold, on a GPU what keeps it busy.
BLOCK, BLOCK_ON_GPU = 2**18, 2**24


class AdamW(torch.optim.Optimizer):
    """Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", computed in float32 by torch's fused kernel.

    State of each parameter: `step`, the moments `exp_avg` and `exp_avg_sq` (with `exp_avg_scale` and `exp_avg_sq_scale`
    if they are codes), and the `rest` of a bf16 weight that together with it is the weight in float32.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        name: moments.Name = "adamw",
        precision: Precision = "fp32",
        offload: bool = False,
        seed: int = 0,
        stage: Stage | None = None,
        numbers: Mapping[Tensor, int] | None = None,
        twins: Collection[Tensor] = (),
    ) -> None:
        """
        Args:
            groups: parameters (`params`), each group with its `weight_decay`.
            lr: of the next step, until `set_lr` changes it.
            betas: decay of the two moments.
            eps: added to the root of the second moment.
            name: format of the moments.
            precision: how bf16 weights take a step, and that moments of them which are floats are float32 with "fp32"
                and bf16 otherwise. Other weights take it as they are.
            offload: keep the state in host memory and compute there. Weights and gradients stay where they are.
            seed: of stochastic rounding. What is drawn depends on it, the step and the parameter, and on nothing else.
            stage: whose parameters these are, if a pipeline has the others.
            numbers: of each parameter among those of all stages; None: counted.
            twins: those that another stage has as well, where their norm is counted.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._name, self._precision, self._offload, self._seed = name, precision, offload, seed
        self._groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        self._index = {parameter: index for index, parameter in enumerate(self._groups)}
        if numbers is not None:
            self._index = {parameter: numbers[parameter] for parameter in self._groups}
        self._stage = stage
        self._twins = {self._index[parameter] for parameter in twins}
        self._norms: dict[int, Tensor] = {}  # of gradients that a step in the backward has freed

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Every parameter with a gradient takes its step."""
        waiting = [parameter for parameter in self._groups if parameter.grad is not None]
        # All copies to the host are asked for before the first one is waited for.
        for parameter, copies in [(parameter, self._copies(parameter)) for parameter in waiting]:
            self._step(parameter, copies)

    def step_in_backward(self) -> None:
        """From now on a parameter takes its step when the backward has its gradient, which is gone right after."""

        @torch.no_grad()
        def act(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._norms[self._index[parameter]] = _norm(local(parameter.grad))
            self._step(parameter, self._copies(parameter))
            parameter.grad = None

        for parameter in self._groups:
            parameter.register_post_accumulate_grad_hook(act)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Shrink the gradient to a norm of `max_norm` if it is larger (None: leave it), and return what it was.

        After steps in the backward there is no gradient left, and it is the norm of those that were.
        """
        waiting = [parameter for parameter in self._groups if parameter.grad is not None]
        norms = {self._index[p]: _norm(local(p.grad)) for p in waiting if p.grad is not None} or self._norms
        self._norms = {}
        counted = norms.keys() - self._twins
        found = {parameter: norms[index] for parameter, index in self._index.items() if index in counted}
        norm = norm_of_whole(found.values(), found)
        if self._stage is not None:
            norm = self._stage.sum(norm.square()).sqrt()
        if max_norm is not None and waiting:
            share = (max_norm / (norm + 1e-6)).clamp(max=1)  # as in torch.nn.utils.clip_grads_with_norm_
            torch._foreach_mul_([local(parameter.grad) for parameter in waiting], share)
        return norm

    @torch.no_grad()
    def master(self, parameter: Tensor) -> Tensor:
        """The weight that steps change, in float32: a bf16 one with its rest. One without a rest is given as it is."""
        rest = self.state[parameter].get("rest") if parameter in self.state else None
        if rest is None:
            return parameter.detach()
        return like(parameter, join(local(parameter.detach()).to(rest.device), rest))

    def state_dict(self) -> dict[str, Any]:
        """The state of each parameter by its number; of those of other stages only how many steps they took."""
        packed = super().state_dict()
        numbers = list(self._index.values())
        packed["state"] = {numbers[index]: state for index, state in packed["state"].items()}
        if self._stage is not None:
            steps = {number: {"step": state["step"]} for number, state in packed["state"].items()}
            for others in self._stage.gather(steps):
                packed["state"] = others | packed["state"]
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take moments and rests of a checkpoint; settings and formats stay those of this optimizer.

        What was saved in another format is converted.
        """
        for parameter, index in self._index.items():
            if (saved := state_dict["state"].get(index)) is None:
                continue
            state = self._state(parameter)
            state["step"] = int(saved["step"])
            for key, signed in MOMENTS.items():
                scale = f"{key}_scale"
                value, saved_scale = saved[key], saved.get(scale)
                if is_spread(parameter):
                    value, saved_scale = self._held(parameter, moments.read(value, saved_scale, signed=signed)), None
                moments.assign(state[key], state.get(scale), value, saved_scale, signed=signed)
            if "rest" in state and "rest" in saved:
                state["rest"].copy_(self._held(parameter, saved["rest"]))

    @torch.no_grad()
    def spread_state(
        self,
        saved: Mapping[int, Mapping[str, Any]] | None = None,
        mesh_like: Callable[[DeviceMesh], DeviceMesh] | None = None,
    ) -> dict[str, Tensor]:
        """Moments and rests by name, each lying over the processes as its parameter does, and floats instead of codes.

        Args:
            saved: the state of each parameter, from `state_dict` or a copy of that. None: this optimizer's; what is not
                there yet is made.
            mesh_like: as of `dtensors.like`.
        """
        tensors = {}
        for parameter, index in self._index.items():
            state = self._state(parameter) if saved is None else saved.get(index, {})
            for key, signed in MOMENTS.items() if state else ():
                value = moments.read(state[key], state.get(f"{key}_scale"), signed=signed)
                tensors[f"{index}.{key}"] = like(parameter, value.view(local(parameter).shape), mesh_like)
            if "rest" in state:
                tensors[f"{index}.rest"] = like(parameter, state["rest"], mesh_like)
        return tensors

    @staticmethod
    def _held(parameter: Tensor, saved: Tensor) -> Tensor:
        """The part of a saved tensor that belongs to the part of the parameter that is here."""
        return local(saved) if is_spread(saved) else saved.view(parameter.shape)[held(parameter)]

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            parameter = local(parameter.detach())
            device = torch.device("cpu") if self._offload else parameter.device
            has_rest = parameter.dtype == torch.bfloat16 and self._precision == "fp32"
            state["step"] = 0
            for key in MOMENTS:
                dtype = torch.float32 if has_rest else parameter.dtype
                state[key], scale = moments.zeros(self._name, parameter, dtype, device)
                if scale is not None:
                    state[f"{key}_scale"] = scale
            if has_rest:
                state["rest"] = torch.zeros_like(parameter, dtype=torch.int16, device=device)
        return state

    def _copies(self, parameter: Tensor) -> _Copies | None:
        """Of weight and gradient on the host, which are there as soon as they are `ready`."""
        if not self._offload:
            return None
        assert parameter.grad is not None
        # To memory that the GPU writes by itself: torch takes such for copies that need not be waited for.
        tensors = (local(tensor) for tensor in (parameter.detach(), parameter.grad))
        weight, gradient = (tensor.to("cpu", non_blocking=True) for tensor in tensors)
        if parameter.is_meta:  # a plan, which waits for nothing
            return _Copies(weight, gradient, None)
        return _Copies(weight, gradient, torch.accelerator.current_stream(parameter.device).record_event())

    def _step(self, parameter: Tensor, copies: _Copies | None) -> None:
        if copies is None:
            assert parameter.grad is not None
            # The kernel takes gradients to lie in memory as the weights do, and some are transposed.
            self._advance(parameter, local(parameter.detach()), local(parameter.grad).contiguous())
        else:
            if copies.ready is not None:
                copies.ready.synchronize()
            self._advance(parameter, copies.weight, copies.gradient.contiguous())
            local(parameter.detach()).copy_(copies.weight, non_blocking=True)

    def _advance(self, parameter: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """Change `weight` and the state of `parameter`."""
        state, group = self._state(parameter), self._groups[parameter]
        state["step"] += 1
        step = torch.full((), float(state["step"]), device=weight.device)
        adamw = functools.partial(_fused_adamw, step=step, group=group)
        kept = {key: tensor for key, tensor in state.items() if key != "step"}
        if self._precision != "stochastic" and all(tensor.dtype == weight.dtype for tensor in kept.values()):
            adamw(weight, gradient, *kept.values())
            return

        rounding = self._rounding(self._index[parameter], state["step"], weight.device)
        size = BLOCK if weight.device.type == "cpu" else BLOCK_ON_GPU
        # Codes and scales are fewer than weights, in a ratio that divides a block.
        flat = [tensor.view(-1) for tensor in (weight, gradient, *kept.values())]
        for weights, gradients, *others in blocks(flat, size):
            block = dict(zip(kept, others, strict=True))
            rest = block.get("rest")
            value = widen(weights) if rest is None else join(weights, rest)
            scales = {key: block.get(f"{key}_scale") for key in MOMENTS}
            floats = {key: moments.read(block[key], scales[key], signed=signed) for key, signed in MOMENTS.items()}
            adamw(value, gradients, *floats.values())
            for key, signed in MOMENTS.items():
                moments.write(floats[key], block[key], scales[key], signed=signed, rounding=rounding)
            if rest is not None:
                split(value, weights, rest)
            elif weights.dtype != value.dtype:
                rounding(value, weights)

    def _rounding(self, index: int, step: int, device: torch.device) -> Rounding:
        if self._precision != "stochastic":
            return lambda value, rounded: rounded.copy_(value)
        digest = hashlib.blake2b(f"{self._seed} {step} {index}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu" if device.type == "meta" else device)
        generator.manual_seed(int.from_bytes(digest, "little"))
        return functools.partial(round_stochastically, generator=generator)


class _Copies(NamedTuple):
    weight: Tensor
    gradient: Tensor
    ready: torch.Event | None


def blocks(tensors: list[Tensor], size: int) -> Iterable[tuple[Tensor, ...]]:
    """`size` values of the first tensor at a time, and the same part of the others. A plan takes the first two."""
    pieces = [tensor.split(size * tensor.numel() // tensors[0].numel()) for tensor in tensors]
    return zip(*pieces, strict=True)


def _fused_adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, step: Tensor, group: dict[str, Any]
) -> None:
    """One step in place; weight and moments are of one dtype, and the kernel computes in float32 whatever it is."""
    beta1, beta2 = group["betas"]
    settings = {key: group[key] for key in ("lr", "weight_decay", "eps")}
    tensors = [[weight], [gradient.to(weight.dtype)], [first], [second], [], [step]]
    torch._fused_adamw_(*tensors, beta1=beta1, beta2=beta2, **settings, amsgrad=False, maximize=False)


def _norm(gradient: Tensor) -> Tensor:
    # Without a dtype, as in torch's own functions, it would have the 8 bits of bf16.
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
