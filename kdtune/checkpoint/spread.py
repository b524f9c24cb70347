"""The part of a run's state that several processes hold together: each writes and reads the tensors that it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from kdtune.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@runtime_checkable
class Spread(Protocol):
    """What may be held by several processes together: an optimizer."""

    def spread_state(
        self,
        saved: Mapping[int, Mapping[str, Any]] | None = None,
        mesh_like: Callable[[DeviceMesh], DeviceMesh] | None = None,
    ) -> dict[str, Tensor]: ...


def write_spread(folder: Path, part: Spread, state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Every process writes the tensors that it holds; what is left of the state is returned."""
    import torch.distributed.checkpoint as dcp

    tensors = part.spread_state(state["state"], ranks.mesh_like)
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
    except dcp.api.CheckpointException as error:  # on all of them
        (failure, _), *_ = error.failures.values()
        raise OSError(f"{folder}: {failure}") from error
    steps = {index: {"step": entries["step"]} for index, entries in state["state"].items()}
    return {**state, "state": steps}


def read_spread(folder: Path, part: object, state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What `write_spread` wrote, by however many processes; nothing if it did not."""
    if not folder.is_dir() or not isinstance(part, Spread):
        return {}
    import torch.distributed.checkpoint as dcp

    tensors = part.spread_state()
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    tensors = {name: tensor for name, tensor in tensors.items() if name in saved}
    dcp.load(tensors, storage_reader=reader, no_dist=ranks.size == 1)
    entries = {index: dict(entry) for index, entry in state["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        entries[int(index)][key] = tensor
    return {"state": entries}
