"""The processes that train together, as torchrun starts them, and how a model is spread over them.

A process that was not started by torchrun is alone, and then nothing here changes anything.
"""

from __future__ import annotations

import datetime
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdtune import devices, pipeline_parallel
from kdtune.config import setting
from kdtune.data import Share
from kdtune.models import Decoder, is_quantized, trained_parameters
from kdtune.stage import Stage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Of the mesh, slowest first: neighbours, between whom most crosses, split the products of one layer.
DIMENSIONS = ("pipeline", "data_replicate", "data_shard", "context", "tensor")
T = TypeVar("T")
_TIMEOUT = datetime.timedelta(minutes=30)  # of waiting for other ranks: saving and reading of data included


@dataclass
class ParallelConfig:
    """How models are spread over the processes that torchrun starts; their product is the number of processes."""

    pipeline: int = setting(1, gt=0)  # processes that each have some layers, and pass micro-batches on to the next
    data_replicate: int = setting(1, gt=0)  # groups that hold all of the model each; each trains on its own rows
    data_shard: int | None = setting(None, gt=0)  # processes that hold a model together (FSDP); null: all of a group
    context: int = setting(1, gt=0)  # processes that split each row's positions
    tensor: int = setting(1, gt=0)  # processes that split each layer's products and the vocabulary; they share rows
    reshard_after_forward: bool = True  # gather a layer's weights again in the backward; false: keep them till then
    offload: bool = False  # each process's part of weights, gradients and moments is in host memory, and steps too

    def place(self, device: torch.device) -> torch.device:
        """Where a process that computes on `device` keeps its part."""
        return torch.device("cpu") if self.offload else device


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        device: where this one computes.
        rank: its number.
        size: how many there are.
        mesh: of `DIMENSIONS`; None if it is alone.
        stage: its place in a pipeline; None without one.
        group: of all of them, over which they speak; None is torch's first one.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    stage: Stage | None = None
    group: dist.ProcessGroup | None = None
    _meshes: dict[tuple[int, ...], DeviceMesh] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    @property
    def is_first_of_rows(self) -> bool:
        """Whether this is the one of those that have the same rows to write what all of them know."""
        return self.mesh is None or self.mesh.get_local_rank("tensor") == 0

    @property
    def is_first_with_head(self) -> bool:
        """Whether this is the one of those that have a model's head to write it."""
        share = self.share
        return share.is_scored and share.rank == share.slice == 0 and self.is_first_of_rows

    @property
    def num_replicas(self) -> int:
        """How many groups hold a model each."""
        return 1 if self.mesh is None else self.mesh.size(DIMENSIONS.index("data_replicate"))

    @property
    def replica(self) -> int:
        """Which of them this one belongs to."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("data_replicate")

    @property
    def share(self) -> Share:
        """What this one gets of the rows of a step."""
        if self.mesh is None or (place := self.mesh.get_coordinate()) is None:
            return Share()
        _, _, shard, slice, _ = place
        _, _, num_shards, num_slices, _ = self.mesh.shape
        rank = self.replica * num_shards + shard
        is_scored = self.stage is None or self.stage.is_last
        return Share(rank, self.num_replicas * num_shards, slice, num_slices, is_scored)

    @property
    def folder(self) -> str:
        """Where what each one writes for itself lies in the folder of such things; alone it is that folder."""
        return "" if self.mesh is None else f"rank_{self.rank}"

    def describe(self) -> str:
        """Where they compute, and how they share the work."""
        if self.mesh is None:
            return devices.describe(self.device)
        degrees = zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True)
        layout = ", ".join(f"{name} {degree}" for name, degree in degrees if degree > 1)
        return f"{devices.describe(self.device)}, {self.size} processes ({layout})"

    def mesh_of_weights(self, cfg: ParallelConfig) -> DeviceMesh:
        """That over which a model is spread, of `DIMENSIONS`, too. All ranks must call.

        Those that have other positions of a row share its weights as those with other rows do.
        """
        assert self.mesh is not None
        pipeline, replicate, shard, context, tensor = check_layout(cfg, self.size)
        degrees = (pipeline, replicate, shard * context, 1, tensor)
        if degrees == self.mesh.shape:
            return self.mesh
        if degrees not in self._meshes:  # each has communicators of its own
            self._meshes[degrees] = dist.init_device_mesh(self.mesh.device_type, degrees, mesh_dim_names=DIMENSIONS)
        return self._meshes[degrees]

    def all_sum(self, values: Tensor | Sequence[float]) -> list[float]:
        """Sums over all ranks, as numbers; for a tensor on a device that waits for it.

        Of a tensor-parallel group, which computes the same values, the first counts.
        """
        if not isinstance(values, Tensor):
            values = torch.tensor(values, dtype=torch.float64)
        if self.mesh is not None:
            values = values.clone() if self.mesh.get_local_rank("tensor") == 0 else torch.zeros_like(values)
            dist.all_reduce(values, group=self.group)
        return values.tolist()

    def total(self, count: int) -> int:
        """The sum over all ranks."""
        return int(self.all_sum([count])[0])

    def most(self, value: float) -> float:
        """The largest of all ranks."""
        found = torch.tensor(value, dtype=torch.float64)
        if self.mesh is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.item()

    def any(self, flag: bool) -> bool:
        """Whether it is set on one of them."""
        return self.most(flag) > 0

    def gather(self, value: Any) -> list[Any]:
        """That of each rank."""
        values = [value] * self.size
        if self.mesh is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, value: T) -> T:
        """That of the first rank, for what each may have found at another moment."""
        values = [value]
        if self.mesh is not None:
            dist.broadcast_object_list(values, 0, self.group, torch.device("cpu"))
        return values[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.mesh is not None:
            dist.barrier(self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Until all ranks are here; an error of one inside is then raised on all, so that nobody waits for it.

        For what each does by itself: a collective inside would wait.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        kinds = (kind for kind in (OSError, ValueError, FloatingPointError) if isinstance(failure, kind))
        failures = self.gather(None if failure is None else (next(kinds, RuntimeError), str(failure)))
        if failure is not None:
            raise failure
        for kind, text in filter(None, failures):
            raise kind(text)

    def apart(self) -> Ranks:
        """The same ranks on the host, over a group of their own: for a thread that speaks while training does."""
        if self.mesh is None:
            return self
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return replace(self, device=torch.device("cpu"), group=group)

    def mesh_like(self, mesh: DeviceMesh) -> DeviceMesh:
        """That over whose groups these ranks speak, of one that training has. All must call."""
        if self.group is None:
            return mesh
        root = mesh._get_root_mesh()
        names = root.mesh_dim_names or ()
        if root.shape not in self._meshes:
            # Named, or a dimension of all ranks would have torch's first group.
            backends: dict[Any, Any] = dict.fromkeys(names, "gloo")
            made = dist.init_device_mesh("cpu", root.shape, mesh_dim_names=names, backend_override=backends)
            self._meshes[root.shape] = made
        return self._meshes[root.shape][mesh.mesh_dim_names or ()]

    def leave(self) -> None:
        """The last call: without it torch complains."""
        if self.mesh is not None:
            dist.destroy_process_group()


ALONE = Ranks(torch.device("cpu"))  # where the device does not matter


def join(cfg: ParallelConfig, device: str) -> Ranks:
    """Meet the other processes, if torchrun started this one.

    Args:
        cfg: how models are spread.
        device: the setting; of `cuda` each process takes the GPU of its number on the machine.

    Raises:
        ValueError: there is no such device, or the settings do not go with the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    check_layout(cfg, size)
    if size == 1:
        return Ranks(devices.resolve(device))
    local_rank = int(os.environ["LOCAL_RANK"])
    own = devices.resolve(device if torch.device(device).type == "cpu" else f"{torch.device(device).type}:{local_rank}")
    if own.type != "cpu":
        torch.accelerator.set_device_index(local_rank)
    if not dist.is_initialized():
        # Counts and flags of the host go over gloo, without waiting for the device.
        backend = "gloo" if own.type == "cpu" else f"cpu:gloo,{own.type}:{dist.get_default_backend_for_device(own)}"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    return arrange(cfg, own)


def arrange(cfg: ParallelConfig, device: torch.device) -> Ranks:
    """The place of each of the processes that have met; `device` is where this one computes."""
    size = dist.get_world_size()
    # For a plan there need be no GPU, and nothing is sent.
    kind = "cpu" if device.type == "meta" else device.type
    mesh = dist.init_device_mesh(kind, check_layout(cfg, size), mesh_dim_names=DIMENSIONS)
    stage = None
    if cfg.pipeline > 1:
        pipelines = torch.arange(size).view(cfg.pipeline, -1).T.tolist()
        onward, back = (dist.new_subgroups_by_enumeration(pipelines)[0] for _ in range(2))
        assert onward is not None
        assert back is not None
        stage = Stage(onward, back)
    return Ranks(device, dist.get_rank(), size, mesh, stage)


def check_layout(cfg: ParallelConfig, size: int, section: str = "parallel") -> tuple[int, ...]:
    """Over how many of so many processes each of `DIMENSIONS` goes, by the settings of a section.

    Raises:
        ValueError: they do not multiply to it.
    """
    others = cfg.pipeline * cfg.data_replicate * cfg.context * cfg.tensor
    data_shard = cfg.data_shard or max(1, size // others)
    degrees = (cfg.pipeline, cfg.data_replicate, data_shard, cfg.context, cfg.tensor)
    if math.prod(degrees) != size:
        is_given = cfg.data_shard is not None
        named = [
            f"{section}.{name}={degree}"
            for name, degree in zip(DIMENSIONS, degrees, strict=True)
            if degree > 1 or (name == "data_shard" and is_given)
        ]
        raise ValueError(
            f"{' times '.join(named)} is {math.prod(degrees)}, and there {'is' if size == 1 else 'are'} {size} "
            f"process{'es' * (size > 1)}: every process has one place. Start as many with kdtune run --nproc-per-node"
            + (f", or leave {section}.data_shard out, which takes what is left." if is_given else ", or a multiple.")
        )
    return degrees


def is_shared(cfg: ParallelConfig, size: int) -> bool:
    """Whether a model is held by several processes together, and not by each."""
    return check_layout(cfg, size)[1] < size


def sharding(
    ranks: Ranks, cfg: ParallelConfig, *, trains: bool, vocab_size: int | None = None
) -> Callable[[Decoder], None] | None:
    """What spreads a model on `meta` over the ranks, before it is filled; None if each is to hold all of it.

    Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277: each rank holds a part of every weight, and gathers a layer's
    whole weights while that layer computes. Gradients are summed, not averaged: a loss is divided by the labels of all.

    Args:
        ranks: the processes.
        cfg: how it is spread, which for a teacher need not be as for the student.
        trains: it has gradients. Without, its layers' weights are let go after each forward.
        vocab_size: of the student, if this is its teacher (see `tensor_parallel.split`).
    """
    if ranks.mesh is None or not (trains or is_shared(cfg, ranks.size)):
        return None
    mesh, context = ranks.mesh_of_weights(cfg), ranks.mesh["context"].get_group()
    tensor_mesh = mesh["tensor"]
    mesh = mesh["data_replicate", "data_shard"] if cfg.data_replicate > 1 else mesh["data_shard"]

    def shard(model: Decoder) -> None:
        from torch.distributed import fsdp

        # FSDP2's warning of hidden states that are a view (torch 2.13), into which nobody writes.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        if cfg.context > 1:
            from kdtune.context_parallel import slice_rows

            slice_rows(model, context)
        if cfg.tensor > 1:
            from kdtune import tensor_parallel

            tensor_parallel.split(model, tensor_mesh, vocab_size)
        if ranks.stage is not None:
            pipeline_parallel.split(model, ranks.stage, cfg.tensor)
        if not trains and mesh.size(-1) == 1:
            return  # nothing to gather, and no gradients to add up
        if cfg.offload:
            model.compute_device = ranks.device
        again = cfg.reshard_after_forward or not trains
        units = _units(model)
        # Weights in few bits cannot be cut. Where there are some, each process has all that is frozen, and nothing but
        # what is trained is gathered.
        in_few_bits = any(is_quantized(parameter) for parameter in model.parameters())
        kept = {parameter for parameter in model.parameters() if in_few_bits and not parameter.requires_grad}
        settings = _settings(cfg, mesh, model.head.weight.dtype) | {"ignored_params": kept}
        for unit in units:
            fsdp.fully_shard(unit, reshard_after_forward=again, **settings)
        # Head and norm stay gathered from the forward to the backward: the loss, which is outside, needs the head.
        fsdp.fully_shard(model, reshard_after_forward=False, **settings)
        for method in ("hidden", "hidden_states"):
            fsdp.register_fsdp_forward_method(model, method)
        if trains:
            model.model.register_forward_hook(_ask_for_gradient)
        _sum_gradients(model, *units)

    return shard


def share_beside(model: Decoder, ranks: Ranks, cfg: ParallelConfig) -> None:
    """Spread what is trained beside a model, on the device of its weights, as the model is. All ranks must call.

    They have the same numbers there, and each sees its own rows, or positions of them.

    Args:
        model: spread by `sharding`; `beside` is called as a module, in each forward once.
        ranks: the processes.
        cfg: how the model is spread.
    """
    if ranks.mesh is None or not any(True for _ in model.beside.parameters()):
        return
    from torch.distributed import fsdp

    mesh = ranks.mesh_of_weights(cfg)
    if cfg.tensor > 1:
        from kdtune import tensor_parallel

        tensor_parallel.share(model.beside, mesh["tensor"])
    mesh = mesh["data_replicate", "data_shard"] if cfg.data_replicate > 1 else mesh["data_shard"]
    dtype = next(model.beside.parameters()).dtype
    fsdp.fully_shard(model.beside, reshard_after_forward=False, **_settings(cfg, mesh, dtype))
    _sum_gradients(model.beside)


def _settings(cfg: ParallelConfig, mesh: DeviceMesh, dtype: torch.dtype) -> dict[str, Any]:
    from torch.distributed import fsdp

    return {
        "mesh": mesh,
        "mp_policy": fsdp.MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32)),
        "offload_policy": fsdp.CPUOffloadPolicy() if cfg.offload else fsdp.OffloadPolicy(),
    }


def _sum_gradients(*units: Any) -> None:
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _units(model: Decoder) -> list[Any]:
    """Modules inside of the model whose weights are gathered together: layers, and an embedding that is not the head.

    The gradients of a unit are of one format (torch 2.13). Beside adapters, which are float32, a module that is trained
    in bf16 is a unit inside of the layer's, which comes before it.
    """
    units: list[Any] = [*model.model.layers]
    if not model.config.tie_embeddings:
        units.append(model.model.embed_tokens)
    if len({parameter.dtype for parameter in model.parameters() if parameter.requires_grad}) > 1:
        for module in model.model.modules():
            own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
            is_narrow = any(parameter.dtype != torch.float32 for parameter in own)
            if is_narrow and module is not model.model.embed_tokens:
                units.insert(0, module)
    return [unit for unit in units if any(True for _ in unit.parameters())]  # those of this stage of a pipeline


def _ask_for_gradient(_: nn.Module, args: Any, hidden: Tensor) -> None:
    """FSDP goes by the gradient of what a model returned, which has none where nothing but the head is trained."""
    if torch.is_grad_enabled():
        hidden.requires_grad_()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, of which each process has its part."""
    reshard(model)
    return {name: parameter.detach() for name, parameter in trained_parameters(model).items()}


def reshard(model: nn.Module) -> None:
    """Let go what a forward without a backward left gathered."""
    for module in model.modules():
        if let_go := getattr(module, "reshard", None):  # FSDPModule's
            let_go()
