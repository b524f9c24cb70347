"""Rows of files: which of a folder belong to a split, and how each kind is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from kdtune.data import token_files
from kdtune.data.rows import BATCH_SIZE, NO_END, BadRow, Row, Shard

_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_SURROGATE = b"\\ud"  # how json begins to write half of a character
_BLOCK_SIZE = 2**20  # characters of a text file that are looked at together


def find(path: Path, split: str | None, section: str) -> list[Path]:
    """The data files of a folder (or the file itself) that belong to a split.

    Raises:
        ValueError: none, or of several kinds.
    """
    if path.is_file():
        if split not in (None, "train"):
            raise ValueError(
                f"{section}.split={split}: {path} is one file and has no splits. Give the file of that split."
            )
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        kind = kind_of(file)
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
        names = set(named.values())
        if len(names) == 1 or names == {None, "train"}:
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


def kind_of(path: Path) -> str | None:
    """What a file's name says that it holds; None: nothing that is known."""
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


def shard(
    path: Path,
    separator: str | None,
    token_dtype: token_files.TokenDtype | None,
    document_end_id: int | None,
    section: str,
) -> Shard:
    """A file's rows. Arguments and errors are those of `rows.read`."""
    kind = kind_of(path)
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
