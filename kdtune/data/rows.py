"""Rows out of files, folders and the hub, each with the place that it came from."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

_SPLIT = re.compile(r"(?P<name>[^\[\]]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


class Row(NamedTuple):
    """One row and where it stands, for messages."""

    columns: dict[str, Any]
    source: str
    unit: str  # "row" or "line"
    number: int  # from 1

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number:,} of {self.source}"


def read(
    source: str, *, split: str | None = None, subset: str | None = None, separator: str | None = None
) -> list[Row]:
    """Reads all rows of a file, of the data files in a folder, or of a data set on the hub.

    Args:
        source: path, or owner/name on the hub (only a name that is no path here is looked up there).
        split: name of a split, rows of it in brackets (counts or percent), or both: "test", "train[:90%]", "[:1000]".
        subset: configuration of a hub data set.
        separator: cuts text files into rows.

    Raises:
        FileNotFoundError: no such file, folder or hub data set.
        ValueError: rows that cannot be read; the message says where.
    """
    name, part = _parse_split(split)
    path = Path(source)
    if path.exists():
        if subset is not None:
            raise ValueError(f"name={subset} is the subset of a hub data set, but {source} is on disk. Leave it out.")
        if path.is_dir() and (path / "state.json").is_file():
            rows = _from_saved(path)
        else:
            rows = [row for file in _files(path, name) for row in _read_file(file, separator)]
    elif _HUB_NAME.fullmatch(source) and _kind(path) is None:
        rows = _from_hub(source, subset, name or "train")
    else:
        raise FileNotFoundError(
            f"no file or folder {source} (from {Path.cwd()}). Give a path that exists, or owner/name of a data set on "
            "the Hugging Face hub."
        )
    return rows[part(len(rows))]


def _parse_split(split: str | None) -> tuple[str | None, Callable[[int], slice]]:
    match = _SPLIT.fullmatch(split or "")
    if match is None:
        raise ValueError(f"split={split} is not understood. Write a name, a slice or both: test, train[:90%], [:1000].")

    def index(bound: str | None, num_rows: int) -> int | None:
        if bound is None:
            return None
        return round(num_rows * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)

    return match["name"] or None, lambda num_rows: slice(
        index(match["start"], num_rows), index(match["stop"], num_rows)
    )


def _files(path: Path, split: str | None) -> list[Path]:
    """The data files of a folder (or the file itself) that belong to a split."""
    if path.is_file():
        if split not in (None, "train"):
            raise ValueError(f"split={split}: {path} is one file and has no splits. Give the file of that split.")
        return [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        kind = _kind(file)
        if (
            file.is_file()
            and kind
            and not is_hidden
            and not file.name.startswith(("dataset_info", "README", "LICENSE"))
        ):
            found.setdefault(kind, []).append(file)
    if len(found) > 1:
        found.pop("text", None)  # notes beside the data
    if len(found) != 1:
        there = ", ".join(f"{len(files)} {kind}" for kind, files in found.items()) or "none"
        raise ValueError(
            f"{path} must hold data files of one kind (json, jsonl, csv, parquet or txt); there are: {there}."
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
        raise ValueError(f"{path} has no file of the split {split!r}; there are: {there}.")
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
    }
    return kinds.get(Path(name).suffix.lower())


def _read_file(path: Path, separator: str | None) -> Iterator[Row]:
    kind = _kind(path)
    if kind is None:
        raise ValueError(
            f"{path}: cannot tell what this is. Known endings: .json, .jsonl, .csv, .parquet, .txt, and .gz of these."
        )
    if separator is not None and kind != "text":
        raise ValueError(f"separator={separator!r} is for text files, but {path} is {kind}. Leave it out.")
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    reader = {"json": _read_json, "jsonl": _read_lines, "csv": _read_csv, "text": _read_text}[kind]
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == "text":
                yield from _read_text(file, path, separator)
            else:
                yield from reader(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,}. Convert it first."
        ) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}. Fetch it again.") from None


def _read_json(file: IO[str], path: Path) -> Iterator[Row]:
    text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        first, _, rest = text.lstrip().partition("\n")
        if error.msg == "Extra data" and first.startswith("{") and rest.lstrip().startswith("{"):
            file.seek(0)  # one object per line under the name .json, as many data sets on the hub have it
            yield from _read_lines(file, path)
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
    for number, columns in enumerate(content, start=1):
        yield _row(columns, path, "row", number)


def _read_lines(file: IO[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        line = line.rstrip()  # so that an error at its end is not told of the next line
        if not line:
            continue
        try:
            columns = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number:,}, column {error.colno}: broken json: {error.msg}.") from None
        yield _row(columns, path, "line", number)


def _row(columns: Any, path: Path, unit: str, number: int) -> Row:
    if not isinstance(columns, dict):
        raise ValueError(
            f"{unit} {number:,} of {path} is a {type(columns).__name__}, expected an object with named columns."
        )
    return Row(columns, str(path), unit, number)


def _read_csv(file: IO[str], path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is less than a long document
    reader = csv.DictReader(file, strict=True)
    try:
        for number, columns in enumerate(reader, start=1):
            if None in columns or None in columns.values():
                raise ValueError(
                    f"row {number:,} of {path} (it ends in line {reader.line_num:,}) does not have the "
                    f"{len(reader.fieldnames or ())} fields of the header: {', '.join(reader.fieldnames or ())}."
                )
            yield Row(columns, str(path), "row", number)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num:,}: broken csv: {error}.") from None


def _read_text(file: IO[str], path: Path, separator: str | None = None) -> Iterator[Row]:
    text = file.read()
    for number, document in enumerate(text.split(separator) if separator else [text], start=1):
        if document.strip():
            yield Row({"text": document}, str(path), "document", number)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}. Fetch it again.") from None
    for number, columns in enumerate(rows, start=1):
        yield Row(columns, str(path), "row", number)


def _from_saved(path: Path) -> list[Row]:
    import datasets

    return _numbered(datasets.load_from_disk(str(path)), str(path))


def _from_hub(source: str, subset: str | None, split: str) -> list[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # a dozen kinds, from the network, the hub and the data set itself
        raise ValueError(
            f"no file or folder {source} here, and the Hugging Face hub did not give a data set of that name "
            f"(subset {subset or 'default'}, split {split}): {type(error).__name__}: {str(error).splitlines()[0][:300]}"
        ) from None
    return _numbered(rows, f"{source} ({split})")


def _numbered(rows: Any, source: str) -> list[Row]:
    return [Row(dict(columns), source, "row", number) for number, columns in enumerate(rows, start=1)]
