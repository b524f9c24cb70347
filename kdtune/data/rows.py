"""Rows out of files, folders and the hub, each with the place that it came from, read as they are asked for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, final

from kdtune.data.token_files import TokenDtype

_SPLIT = re.compile(r"(?P<name>[^\[\]]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NO_END = -1  # no id ends a document
BATCH_SIZE = 1024  # rows of a parquet file or a hub data set that are Python objects at one time


class BadRow(ValueError):
    """A row that cannot be used.

    Attributes:
        kind: which kind of trouble, in a few words without values, so that skipped rows can be counted by it.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:  # it comes back from processes that tokenise
        return BadRow, (self.kind, str(self))


class Row(NamedTuple):
    """One row and where it stands, for messages."""

    columns: dict[str, Any]
    source: str
    unit: str  # "row", "line" or "document"
    number: int  # from 1
    error: BadRow | None = None  # why it could not be read; it has no columns then. The message names the place.

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number:,} of {self.source}"


@dataclass(frozen=True)
class Shard:
    """A file, or a split on the hub.

    Attributes:
        name: for messages and cache keys.
        files: what is on disk of it.
        read: its rows, from the one with this number (from 0).
        count: how many rows `read` gives, for less than reading them where that is possible.
        size: the same where it is known without looking at the rows; None: it is not.
    """

    name: str
    files: list[Path]
    read: Callable[[int], Iterator[Row]]
    count: Callable[[], int]
    size: int | None = None


@final
class Rows:
    """The rows of a source, as often as they are asked for; no more than a few exist at one time.

    Attributes:
        shards: where they are, in order.
    """

    def __init__(self, shards: Sequence[Shard], bounds: tuple[str | None, str | None]) -> None:
        self.shards = list(shards)
        self._bounds = bounds
        self._range: tuple[int, int | None] | None = None

    @property
    def files(self) -> list[Path]:
        """What is on disk of it."""
        return [file for shard in self.shards for file in shard.files]

    def __iter__(self) -> Iterator[Row]:
        """Raises BadRow where one cannot be read."""
        for row in self.items():
            if row.error is not None:
                raise row.error
            yield row

    def items(self) -> Iterator[Row]:
        """All rows, those that cannot be read with their `error`: they count when a split is taken."""
        start, stop = self.range()
        return islice(chain.from_iterable(shard.read(0) for shard in self.shards), start, stop)

    def range(self) -> tuple[int, int | None]:
        """First row, and the row behind the last; None: to the end. Counts the rows if percent or ends need it."""
        if self._range is None:
            needs_count = any(bound and (bound.endswith("%") or bound.startswith("-")) for bound in self._bounds)
            if needs_count:
                num_rows = sum(shard.count() for shard in self.shards)
                start, stop = (_index(bound, num_rows) for bound in self._bounds)
                self._range = slice(start, stop).indices(num_rows)[:2]
            else:
                start, stop = (None if bound is None else int(bound) for bound in self._bounds)
                self._range = (start or 0, stop)
        return self._range

    def find(self, numbers: set[int]) -> dict[int, Row]:
        """Rows by their numbers in `items`, from 0. No more is read than lies between them; what is gone is absent."""
        found: dict[int, Row] = {}
        start = -self.range()[0]  # number of the shard's first row
        for i, shard in enumerate(self.shards):
            is_last = i == len(self.shards) - 1
            stop = sys.maxsize if is_last else start + (shard.count() if shard.size is None else shard.size)
            if wanted := {number for number in numbers if start <= number < stop}:
                first, last = min(wanted), max(wanted)
                rows = islice(enumerate(shard.read(first - start), start=first), last - first + 1)
                found |= {number: row for number, row in rows if number in wanted}
            start = stop
        return found

    def size(self) -> int | None:
        """How many there are; None if that is not known without reading them."""
        start, stop = self.range()
        sizes = [shard.size for shard in self.shards]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        if stop is None:
            return None if total is None else max(0, total - start)
        return max(0, (stop if total is None else min(stop, total)) - start)


def read(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    separator: str | None = None,
    token_dtype: TokenDtype | None = None,
    document_end_id: int | None = None,
    streaming: bool = False,
    section: str = "dataset",
) -> Rows:
    """The rows of a file, of the data files in a folder, or of a data set on the hub.

    Args:
        source: path, or owner/name on the hub (only a name that is no path here is looked up there).
        split: name of a split, rows of it in brackets (counts or percent), or both: "test", "train[:90%]", "[:1000]".
        subset: configuration of a hub data set.
        separator: cuts text files into rows.
        token_dtype: how ids are stored in .bin files that have no index.
        document_end_id: cuts arrays of ids into rows.
        streaming: rows of the hub are fetched as they are asked for; False: the whole split before the first.
        section: of the settings, for messages.

    Raises:
        FileNotFoundError: no such file, folder or hub data set.
        ValueError: files that cannot be read. What is wrong in a file shows when its rows are gone through.
    """
    from kdtune.data import files, tables  # which give Shards

    name, bounds = _parse_split(split, section)
    path = Path(source)
    if path.exists():
        if subset is not None:
            raise ValueError(
                f"{section}.name={subset} is the subset of a hub data set, but {source} is on disk. Leave it out."
            )
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            if not (path / (name or "train") / "state.json").is_file():
                raise ValueError(
                    f"{path} has no split {name or 'train'!r}. Name one of the folders in it: {section}.split."
                )
            return Rows([tables.saved(path / (name or "train"))], bounds)
        if path.is_dir() and (path / "state.json").is_file():
            if name not in (None, "train"):
                raise ValueError(
                    f"{section}.split={name}: {path} is one table and has no splits. Give the folder of that split."
                )
            return Rows([tables.saved(path)], bounds)
        shards = [
            files.shard(file, separator, token_dtype, document_end_id, section)
            for file in files.find(path, name, section)
        ]
        return Rows(shards, bounds)
    if _HUB_NAME.fullmatch(source) and files.kind_of(path) is None:
        try:
            return Rows(tables.hub(source, subset, name or "train", streaming), bounds)
        except ValueError as error:
            raise ValueError(f"{section}.source={source}: {error}") from None
    raise FileNotFoundError(
        f"{section}.source={source}: no file or folder of that name (from {Path.cwd()}). Give a path that exists, or "
        "owner/name of a data set on the Hugging Face hub."
    )


def _parse_split(split: str | None, section: str) -> tuple[str | None, tuple[str | None, str | None]]:
    match = _SPLIT.fullmatch(split or "")
    if match is None:
        raise ValueError(
            f"{section}.split={split} is not understood. Write a name, a slice or both: test, train[:90%], [:1000]."
        )
    return match["name"] or None, (match["start"], match["stop"])


def _index(bound: str | None, num_rows: int) -> int | None:
    if bound is None:
        return None
    return round(num_rows * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
