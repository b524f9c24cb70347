"""Files of every kind give the same rows; what cannot be read is refused with its place."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from kdtune.data import rows

ROWS = [{"prompt": f"question {i}, é\n", "completion": f'"answer" {i}'} for i in range(1, 11)]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


def lines(columns: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in columns)


def columns_of(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return [row.columns for row in rows.read(str(path), **settings)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS, "notes": []})),
        ("a.json", json.dumps({"version": 1, "examples": ROWS}, indent=1)),
        ("a.json", lines(ROWS)),
        ("a.jsonl", "\n" + lines(ROWS) + "\n\n"),
        ("a.jsonl", "\ufeff" + lines(ROWS).rstrip()),
        ("a.jsonl.gz", lines(ROWS)),
        ("a.json.gz", json.dumps(ROWS)),
    ],
)
def test_json(name: str, content: str, tmp_path: Path) -> None:
    assert columns_of(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize("split", [None, "[4:]", "[40%:]"])
def test_rows_are_found_by_their_numbers(split: str | None, tmp_path: Path) -> None:
    broken = '{"prompt": \n'
    for i, content in enumerate((lines(ROWS[:3]) + "\n" + broken, lines(ROWS[3:5]), lines(ROWS[5:]))):
        write(tmp_path / f"{i}.jsonl", content)
    found = rows.read(str(tmp_path), split=split)
    expected = list(found.items())
    for numbers in ({0}, {5, 6}, {1, 4, 5}, {0, 1, 2, 3, 6}, set()):
        assert [(number, str(row)) for number, row in sorted(found.find(numbers).items())] == [
            (number, str(expected[number])) for number in sorted(numbers)
        ]
    assert found.find({99}) == {}


def test_csv_and_parquet(tmp_path: Path) -> None:
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    assert columns_of(tmp_path / "a.csv") == ROWS
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert columns_of(tmp_path / "a.parquet") == ROWS


def test_a_long_csv_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")
    assert len(columns_of(path)[0]["text"]) == 300_000


def test_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "first\nstory<|end|>\nsecond<|end|>\n")
    assert columns_of(path) == [{"text": "first\nstory<|end|>\nsecond<|end|>\n"}]
    assert columns_of(path, separator="<|end|>") == [{"text": "first\nstory"}, {"text": "\nsecond"}]
    with pytest.raises(ValueError, match="separator"):
        columns_of(write(tmp_path / "a.jsonl", lines(ROWS)), separator="x")


def test_saved_by_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert columns_of(tmp_path / "saved", split="[:2]") == ROWS[:2]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("[:3]", ROWS[:3]),
        ("[80%:]", ROWS[8:]),
        ("train[:80%]", ROWS[:8]),
        ("[2:-2]", ROWS[2:-2]),
        ("[-10%:]", ROWS[9:]),
        ("train", ROWS),
        ("[:]", ROWS),
    ],
)
def test_slices(split: str, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    assert columns_of(write(tmp_path / "a.jsonl", lines(ROWS)), split=split) == expected


def test_folders(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", lines(ROWS[:4]))
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", lines(ROWS[4:8]))
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", lines(ROWS[8:]))
    write(tmp_path / "data" / ".cache" / "x.jsonl", "broken")
    write(tmp_path / "README.txt", "about")
    assert columns_of(tmp_path) == ROWS[:8]
    assert columns_of(tmp_path, split="test") == ROWS[8:]
    assert columns_of(tmp_path, split="train[6:]") == ROWS[6:8]
    with pytest.raises(ValueError, match=r"^dataset\.split=validation: .* no file of that split.*train-00000"):
        columns_of(tmp_path, split="validation")
    write(tmp_path / "more.csv", "a\n1\n")
    with pytest.raises(ValueError, match=r"one kind.*1 csv"):
        columns_of(tmp_path)


def test_a_folder_without_splits(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", lines(ROWS[5:]))
    write(tmp_path / "a.jsonl", lines(ROWS[:5]))
    assert columns_of(tmp_path) == columns_of(tmp_path, split="train") == ROWS


def test_a_test_split_beside_other_files_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("math", "test"):
        write(tmp_path / f"{name}.jsonl", lines([{"a": name}]))
    with pytest.raises(ValueError, match=r"dataset\.split=train: .* has no file of that split; there are: math\.jsonl"):
        rows.read(str(tmp_path))
    assert columns_of(tmp_path, split="test") == [{"a": "test"}]


def test_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n" + lines(ROWS))
    assert next(iter(rows.read(str(path)))).place == f"line 2 of {path}"
    path = write(tmp_path / "a.json", json.dumps(ROWS))
    assert list(rows.read(str(path)))[1].place == f"row 2 of {path}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(ROWS[:2]) + '{"a": \n', r"a\.jsonl, line 3, column 6: broken json"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json, line 2, column 7: broken json"),
        ("a.json", lines(ROWS[:2]) + "{", r"a\.json, line 3, column 2: broken json"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"line 2 of .*a\.jsonl is a list"),
        ("a.json", '["text"]', r"row 1 of .* is a str"),
        ("a.json", '{"a": 1, "b": 2}', r"keys a, b; expected a list of rows"),
        ("a.json", '{"a": [], "b": []}', r"keys a, b"),
        ("a.json", "3", "holds a int"),
        ("a.json", "", "broken json"),
        ("a.csv", "a,b\n1,2\n3\n", r"row 2 of .*line 3.* 2 fields of the header: a, b"),
        ("a.csv", "a,b\n1,2,3\n", r"row 1 of"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.xlsx", "x", "Known endings"),
    ],
)
def test_broken_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(rows.read(str(path)))


def test_broken_encodings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        list(rows.read(str(tmp_path / "a.jsonl")))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode())[:-20])
    with pytest.raises(ValueError, match="not a complete gzip"):
        list(rows.read(str(tmp_path / "b.jsonl.gz")))


@pytest.mark.parametrize("source", ["data/missing.json", "/no/where", "./here", "a/b/c", "alpaca", "owner/set.jsonl"])
def test_a_missing_path_is_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        rows.read(source)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **settings: Any) -> Any:
        asked.append((arguments, settings))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = rows.read("owner/set", split="test[:2]", subset="main")
    assert [row.columns for row in found] == ROWS[:2]
    assert asked == [(("owner/set", "main"), {"split": "test"})]

    def fail(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"owner/set.*split train.*ConnectionError: no network$"):
        rows.read("owner/set")


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", lines(ROWS)))
    with pytest.raises(ValueError, match="is not understood"):
        rows.read(path, split="train[1")
    with pytest.raises(ValueError, match="has no splits"):
        rows.read(path, split="test")
    with pytest.raises(ValueError, match="subset of a hub data set"):
        rows.read(path, subset="main")


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(ROWS) + "broken\n")
    found = rows.read(str(path))
    assert next(iter(found)).columns == ROWS[0]
    assert [row.columns for row in rows.read(str(path), split="[:10]")] == ROWS
    assert sum(row.error is None for row in found.items()) == 10
    with pytest.raises(rows.BadRow, match="line 11, column 1: broken json") as error:
        list(found)
    assert error.value.kind == "broken json"
    assert pickle.loads(pickle.dumps(error.value)).kind == "broken json"


def test_sizes(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", "\ufeff" + lines(ROWS) + "\n \n"))
    sizes = {None: None, "[:3]": 3, "[50%:]": 5, "[-4:-1]": 3, "[3:2]": 0}
    assert {split: rows.read(path, split=split).size() for split in sizes} == sizes


def test_separators_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtune.data.files._BLOCK_SIZE", 5)
    documents = ["a" * n for n in range(1, 12)]
    path = write(tmp_path / "a.txt", "<end>".join(documents))
    assert [row["text"] for row in columns_of(path, separator="<end>")] == documents
