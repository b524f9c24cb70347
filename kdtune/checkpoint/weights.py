"""Read safetensors files piece by piece, and write them.

The library maps whole files, and pages once touched count as this process's memory until the file is closed. Reading
into a small buffer keeps the peak at the model itself plus that buffer, whatever the tensors' sizes and dtypes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import SEEK_CUR, FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kdtune.dtensors import local

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What is a number only together with a scale. Each is exact in bfloat16.
CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
# Names for integers above -2^(bits - 1) that lie in 32-bit words, the first in the lowest bits.
PACKED = {"U4": 4, "U8": 8}
PIECE = 4 * 2**20  # bytes read at a time
METADATA = "__metadata__"  # what the header has besides tensors


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    dtype: str  # the format's name: "BF16"
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes
    scale: StoredTensor | None = None  # of a quantised weight: what its numbers are multiplied by
    zero_point: StoredTensor | None = None  # what is subtracted from them before
    block: tuple[int, int] = (1, 1)  # rows and columns that share both
    row_pitch: int | None = None  # bytes from the start of a row to that of the next; None: without gaps

    def part(self, rows: slice, columns: slice | None = None) -> StoredTensor:
        """Some rows, or of a matrix some columns of them; of a tensor without a scale."""
        assert self.scale is None
        row = self.size // self.shape[0]
        here = replace(
            self,
            shape=(rows.stop - rows.start, *self.shape[1:]),
            start=self.start + rows.start * row,
            size=(rows.stop - rows.start) * row,
        )
        if columns is None or columns == slice(0, self.shape[1]):
            return here
        item, width = row // self.shape[1], columns.stop - columns.start
        shape = (here.shape[0], width)
        return replace(
            here, shape=shape, start=here.start + columns.start * item, size=shape[0] * width * item, row_pitch=row
        )

    @property
    def is_fp8(self) -> bool:
        """Whether it is e4m3 in whole blocks, which can stay as they are in memory."""
        fits = all(size % block == 0 for size, block in zip(self.shape, self.block, strict=False))
        return self.dtype == "F8_E4M3" and self.scale is not None and self.zero_point is None and fits


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name and place of every tensor in a file.

    Raises:
        ValueError: the file is cut short, or is not a safetensors file.
    """
    file_size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if file_size < 8 + header_size:
            # A damaged or foreign file gives a random, mostly huge size.
            raise ValueError(
                _damaged(file, f"it has {file_size} bytes, and its header alone should have {header_size}")
            )
        try:
            header = json.loads(stream.read(header_size))
        except ValueError:
            raise ValueError(_damaged(file, "its header is not JSON")) from None
    try:
        tensors = {name: _place(file, entry, 8 + header_size) for name, entry in header.items() if name != METADATA}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(_damaged(file, "its header does not say what lies where")) from None
    promised = max((tensor.start + tensor.size for tensor in tensors.values()), default=file_size)
    if file_size < promised:
        raise ValueError(_damaged(file, f"it has {file_size:,} bytes, and its header promises {promised:,}"))
    return tensors


def _place(file: Path, entry: Mapping[str, Any], data: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    stored = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start=data + start, size=end - start)
    dtype = (DTYPES | CODES).get(stored.dtype)
    if start < 0 or (dtype is not None and stored.size != math.prod(stored.shape) * dtype.itemsize):
        raise ValueError
    return stored


def _damaged(file: Path, how: str) -> str:
    return f"{file} is not a complete safetensors file: {how}. Download or copy it again."


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors of the host.

    Raises:
        OSError: the disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        file.touch()
        mode = file.stat().st_mode
        save_file(dict(tensors), file, metadata={"format": "pt"})  # transformers asks for the format
        file.chmod(mode)  # safetensors 0.8 lets nobody but the owner read
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error


def check_finite(trained: Mapping[str, Tensor], what: str) -> None:
    """Refuse to write numbers with which nothing could be done.

    Args:
        trained: by name, of which this process may hold a part.
        what: model or adapter, to name it.

    Raises:
        FloatingPointError: says which are not finite.
    """
    if broken := [name for name, value in trained.items() if not local(value).isfinite().all()]:
        raise FloatingPointError(
            f"{some_of(broken)} hold numbers that are not finite, so the {what} is not written; what was saved before "
            "is untouched. Resume from there with a lower learning rate."
        )


def some_of(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def has_data(tensor: Tensor) -> bool:
    """Whether there is anything to fill: not on meta, nor in a plan, where tensors are shapes alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def read_into(stored: StoredTensor, target: Tensor, buffer: Tensor) -> None:
    """Fill `target`, contiguous and of the same shape, converting to its dtype and device; scaled, if it has a scale.

    `buffer` holds one piece, uint8; keep it for the next tensor (each time a new one would leave holes in the heap).
    """
    flat = target.view(-1)
    bits = PACKED.get(stored.dtype) or 8 * (DTYPES | CODES)[stored.dtype].itemsize
    per_piece = 8 * len(buffer) // bits
    row = stored.size if stored.row_pitch is None else stored.size // stored.shape[0]  # bytes without a gap
    if stored.row_pitch is not None:
        per_piece -= per_piece % stored.shape[1]
        assert per_piece, "a row is larger than the buffer"
    assert 8 * stored.size == bits * math.prod(stored.shape) == bits * flat.numel()
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        for begin in range(0, flat.numel(), per_piece):
            count = min(per_piece, flat.numel() - begin)
            piece = buffer[: count * bits // 8]
            for line in piece.split(row):
                _read_exactly(stream, line.numpy().data, stored.file)
                if stored.row_pitch is not None:
                    stream.seek(stored.row_pitch - row, SEEK_CUR)
            flat[begin : begin + count].copy_(_numbers(piece, stored.dtype))
    if stored.scale is not None:
        scale, zero_point = _read_scale(stored, stored.scale, target.device, buffer), None
        if stored.zero_point is not None:
            zero_point = _read_zero_point(stored.zero_point, scale, buffer)
        (rows, columns), d = stored.block, target.shape[1]
        step = max(1, len(buffer) // (4 * d))  # rows that take no more memory than the buffer in float32
        for begin in range(0, len(target), step):
            piece = target[begin : begin + step]
            block = torch.arange(begin, begin + len(piece), device=target.device) // rows  # of each row
            numbers = piece.float()
            if zero_point is not None:
                numbers -= _widened(zero_point[block], columns, d)
            piece.copy_(numbers.mul_(_widened(scale[block], columns, d)))


def _widened(blocks: Tensor, columns: int, d: int) -> Tensor:
    """What rows have for each block, [r, blocks], for each column, [r, d]; [r, 1] if a row is one block."""
    return blocks.repeat_interleave(columns, dim=1)[:, :d] if columns < d else blocks


def _numbers(piece: Tensor, dtype: str) -> Tensor:
    """What bytes, [n] uint8, stand for in a format."""
    if dtype == "U4":
        return torch.stack([piece & 15, piece >> 4], dim=1).flatten().to(torch.int8) - 8
    if dtype == "U8":
        return piece.to(torch.int16) - 128
    return piece.view((DTYPES | CODES)[dtype])


def read_fp8(stored: StoredTensor, device: torch.device, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [n, d] of a weight that `is_fp8`, and the scales of its blocks."""
    assert stored.scale is not None
    codes = torch.empty(stored.shape, dtype=torch.float8_e4m3fn, device=device)
    read_into(replace(stored, scale=None), codes, buffer)
    return codes, _read_scale(stored, stored.scale, device, buffer)


def _read_scale(stored: StoredTensor, scale: StoredTensor, device: torch.device, buffer: Tensor) -> Tensor:
    """One for each block, [n / rows, d / columns], float32."""
    shape = [-(-size // block) for size, block in zip(stored.shape, stored.block, strict=True)]
    target = torch.empty(shape, device=device)
    read_into(scale, target.view(scale.shape), buffer)
    return target


def _read_zero_point(zero_point: StoredTensor, scale: Tensor, buffer: Tensor) -> Tensor:
    """As many as scales, float32."""
    target = torch.empty(zero_point.shape, device=scale.device)
    read_into(zero_point, target, buffer)
    if zero_point.dtype in PACKED:  # whose words run down the rows
        words, blocks = zero_point.shape[0] * PACKED[zero_point.dtype] // 32, scale.shape[1]
        target = target.view(words, blocks, -1).transpose(1, 2).reshape(-1, blocks)[: len(scale)]
    return target.view(scale.shape)


def _read_exactly(stream: FileIO, view: memoryview, file: Path) -> None:
    # A raw read may return less than asked for: Linux stops at 2 GiB, network file systems sooner.
    while view:
        count = stream.readinto(view)
        if not count:
            raise OSError(_damaged(file, "it ended while being read"))
        view = view[count:]
