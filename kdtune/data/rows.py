"""Rows out of files, folders and the hub, each with the place that it came from, read as they are asked for."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast, final

from kdtune.data import token_files

_SPLIT = re.compile(r"(?P<name>[^\[\]]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
NO_END = -1  # no id ends a document
BATCH_SIZE = 1024  # rows of a parquet file or a hub data set that are Python objects at one time
_SURROGATE = b"\\ud"  # how json begins to write half of a character
_BLOCK_SIZE = 2**20  # characters of a text file that are looked at together


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
    token_dtype: token_files.TokenDtype | None = None,
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
    from kdtune.data import tables  # which gives Shards

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
        files = _files(path, name, section)
        return Rows([_file(file, separator, token_dtype, document_end_id, section) for file in files], bounds)
    if _HUB_NAME.fullmatch(source) and _kind(path) is None:
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


def _files(path: Path, split: str | None, section: str) -> list[Path]:
    """The data files of a folder (or the file itself) that belong to a split."""
    if path.is_file():
        if split not in (None, "train"):
            raise ValueError(
                f"{section}.split={split}: {path} is one file and has no splits. Give the file of that split."
            )
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        kind = _kind(file)
        if (
            file.is_file()
            and kind
            and not is_hidden
            and not (kind == "bin" and file.with_suffix(".idx").is_file())
            and not file.name.startswith(("dataset_info", "README", "LICENSE"))
        ):
            found.setdefault(kind, []).append(file)
    if len(found) > 1:
        found.pop("text", None)  # notes beside the data
    if len(found) != 1:
        there = ", ".join(f"{len(files)} {kind}" for kind, files in found.items()) or "none"
        raise ValueError(
            f"{path} must hold data files of one kind (json, jsonl, csv, parquet, txt, npy, bin or idx); there are: "
            f"{there}."
        )
    (files,) = found.values()

    named = {file: next((name for name in _SPLIT_NAMES if _is_of(file, path, name)), None) for file in files}
    if split is None:
        if len(set(named.values()) - {None}) <= 1:
            return files
        split = "train"
    chosen = [file for file in files if _is_of(file, path, split)]
    if not chosen and split == "train" and not any(named.values()):
        return files
    if not chosen:
        there = ", ".join(str(file.relative_to(path)) for file in files[:10])
        raise ValueError(f"{section}.split={split}: {path} has no file of that split; there are: {there}.")
    return chosen


def _is_of(file: Path, folder: Path, split: str) -> bool:
    return re.search(rf"(^|[-_./]){re.escape(split)}([-_./]|$)", file.relative_to(folder).as_posix()) is not None


def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    kinds = {
        ".json": "json",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".csv": "csv",
        ".parquet": "parquet",
        ".txt": "text",
        ".npy": "npy",
        ".bin": "bin",
        ".idx": "idx",
    }
    return kinds.get(Path(name).suffix.lower())


def _file(
    path: Path,
    separator: str | None,
    token_dtype: token_files.TokenDtype | None,
    document_end_id: int | None,
    section: str,
) -> Shard:
    kind = _kind(path)
    if kind is None:
        raise ValueError(
            f"{path}: cannot tell what this is. Known endings: .json, .jsonl, .csv, .txt, and .gz of these; .parquet; "
            "of ids: .npy, .bin, .idx."
        )
    if kind == "bin" and path.with_suffix(".idx").is_file():
        path, kind = path.with_suffix(".idx"), "idx"
    if separator is not None and kind != "text":
        raise ValueError(f"{section}.separator={separator!r} is for text files, but {path} is {kind}. Leave it out.")
    if token_dtype is not None and kind not in ("npy", "bin"):
        raise ValueError(
            f"{section}.token_dtype={token_dtype} is for .bin files without an index, not for {path}. Leave it out."
        )
    if kind in ("npy", "bin", "idx"):
        return _token_file(path, kind, token_dtype, document_end_id, section)
    if kind == "parquet":
        size = _parquet_size(path)
        return Shard(str(path), [path], partial(_read_parquet, path), lambda: size, size)
    readers: dict[str, Callable[[Path, IO[bytes]], Iterator[Row]]] = {
        "json": _read_json,
        "csv": _read_csv,
        "text": partial(_read_text, separator),
    }

    def read(start: int) -> Iterator[Row]:
        try:
            with _open(path) as file:
                if kind == "jsonl":
                    yield from _read_lines(path, file, start)
                else:
                    yield from islice(readers[kind](path, file), start, None)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,}. Convert it first."
            ) from None
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}. Fetch it again.") from None

    return Shard(str(path), [path], read, lambda: _count(path, kind, read))


def _count(path: Path, kind: str, read: Callable[[int], Iterator[Row]]) -> int:
    if kind != "jsonl":
        return sum(1 for _ in read(0))
    with _open(path) as file:
        first = file.readline().removeprefix(BOM_UTF8)
        return sum(1 for line in chain([first], file) if line.strip())


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path) if path.name.endswith(".gz") else open(path, "rb"))


def _text(file: IO[bytes]) -> IO[str]:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _read_json(path: Path, file: IO[bytes]) -> Iterator[Row]:
    text = file.read().decode("utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        first, _, rest = text.lstrip().partition("\n")
        if error.msg == "Extra data" and first.startswith("{") and rest.lstrip().startswith("{"):
            file.seek(0)  # one object per line under the name .json, as many data sets on the hub have it
            yield from _read_lines(path, file)
            return
        raise ValueError(f"{path}, line {error.lineno:,}, column {error.colno}: broken json: {error.msg}.") from None
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        key = "data" if "data" in lists else next(iter(lists), None)
        if key is None or (key != "data" and len(lists) > 1):
            raise ValueError(
                f"{path} holds one object with the keys {', '.join(content) or '(none)'}; expected a list of rows, or "
                'an object with the rows as its only list or under "data".'
            )
        content = lists[key]
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a list of rows.")
    has_escapes = _SURROGATE.decode() in text.lower()
    for number, columns in enumerate(content, start=1):
        yield _row(columns, path, "row", number, has_escapes)


def _read_lines(path: Path, file: IO[bytes], start: int = 0) -> Iterator[Row]:
    num_skipped = 0
    for number, line in enumerate(file, start=1):
        line = (line.removeprefix(BOM_UTF8) if number == 1 else line).rstrip()  # an error at its end is of this line
        if not line:
            continue
        if num_skipped < start:
            num_skipped += 1
            continue
        try:
            columns = json.loads(line.decode())
        except UnicodeDecodeError as error:
            message = f"{path}, line {number:,}, byte {error.start + 1}: not UTF-8 text: {error.reason}."
            yield Row({}, str(path), "line", number, BadRow("not UTF-8", message))
        except json.JSONDecodeError as error:
            message = f"{path}, line {number:,}, column {error.colno}: broken json: {error.msg}."
            yield Row({}, str(path), "line", number, BadRow("broken json", message))
        except RecursionError:
            message = f"{path}, line {number:,}: broken json: it is nested too deeply."
            yield Row({}, str(path), "line", number, BadRow("broken json", message))
        else:
            yield _row(columns, path, "line", number, _SURROGATE in line.lower())


def _row(columns: Any, path: Path, unit: str, number: int, has_escapes: bool) -> Row:
    if isinstance(columns, dict):
        try:
            # Text of other kinds of files is decoded from UTF-8, which has no such thing. What tokenizers make of it
            # differs: an error of their own, or another text.
            if has_escapes:
                json.dumps(columns, ensure_ascii=False).encode()
            return Row(columns, str(path), unit, number)
        except UnicodeEncodeError:
            message = f"{unit} {number:,} of {path} holds half of a character (a lone surrogate such as \\ud83d)."
            return Row({}, str(path), unit, number, BadRow("not Unicode", message))
    message = f"{unit} {number:,} of {path} is a {type(columns).__name__}, expected an object with named columns."
    return Row({}, str(path), unit, number, BadRow("not an object", message))


def _read_csv(path: Path, file: IO[bytes]) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is less than a long document
    reader = csv.DictReader(_text(file), strict=True)
    try:
        for number, columns in enumerate(reader, start=1):
            if None in columns or None in columns.values():
                message = (
                    f"row {number:,} of {path} (it ends in line {reader.line_num:,}) does not have the "
                    f"{len(reader.fieldnames or ())} fields of the header: {', '.join(reader.fieldnames or ())}."
                )
                yield Row({}, str(path), "row", number, BadRow("wrong number of fields", message))
            else:
                yield Row(columns, str(path), "row", number)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num:,}: broken csv: {error}.") from None


def _read_text(separator: str | None, path: Path, file: IO[bytes]) -> Iterator[Row]:
    for number, document in enumerate(_documents(_text(file), separator), start=1):
        if document.strip():
            yield Row({"text": document}, str(path), "document", number)


def _documents(file: IO[str], separator: str | None) -> Iterator[str]:
    if not separator:
        yield file.read()
        return
    rest = ""
    while block := file.read(_BLOCK_SIZE):
        *documents, rest = (rest + block).split(separator)
        yield from documents
    yield rest


def _token_file(
    path: Path, kind: str, token_dtype: token_files.TokenDtype | None, document_end_id: int | None, section: str
) -> Shard:
    if document_end_id is None:
        raise ValueError(f"{path} holds ids, not text. Say so: {section}.format=tokens.")
    size: int | None = None
    cut: Callable[[], Iterator[Any]]
    if kind == "idx":
        indexed = token_files.open_indexed(path)
        files, size, cut = [path, path.with_suffix(".bin")], len(indexed), partial(iter, indexed)
    else:
        array = token_files.open_array(path, token_dtype, section)
        files, size = [path], len(array) if array.ndim == 2 else None
        if size is None and document_end_id == NO_END:
            raise ValueError(
                f"{path} is one array, and the tokenizer names no eos token, so that nothing says where a document "
                f"ends. Give {section}.document_end_id."
            )
        cut = partial(token_files.documents, array, document_end_id)

    def read(start: int) -> Iterator[Row]:
        for number, ids in islice(enumerate(cut(), start=1), start, None):
            yield Row({"tokens": ids}, str(path), "document", number)

    return Shard(str(path), files, read, lambda: sum(1 for _ in cut()) if size is None else size, size)


def _parquet_size(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}. Fetch it again.") from None


def _read_parquet(path: Path, start: int) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_SIZE):
                skipped = min(batch.num_rows, max(0, start - number))
                number += skipped
                for columns in batch.slice(skipped).to_pylist():
                    number += 1
                    yield Row(columns, str(path), "row", number)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet after row {number:,}: {error}. Fetch it again.") from None
