"""Sets of ids: columns, arrays, and Megatron's indexed data sets, written here from their published layout."""

from __future__ import annotations

import copy
import json
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import tokenizer_folders as folders
from pyarrow import parquet

from kdtune import data, tokenizers
from kdtune.data import IGNORE, DatasetConfig, Examples

pytestmark = pytest.mark.filterwarnings("ignore:.*of its rows")  # sets of a few odd ones

END = 7
DOCUMENTS = [[1, 2, 3, END], [4, END], [5, 6, 8, 9, 10, END]]
CODES = {np.uint8: 1, np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5, np.float64: 6, np.float32: 7, np.uint16: 8}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.load(folders.qwen(tmp_path_factory.mktemp("tokenizer")))


def load(source: Path, tokenizer: tokenizers.Tokenizer, max_seq_len: int = 64, **settings: Any) -> Examples:
    return data.load(DatasetConfig(source=str(source), format="tokens", **settings), tokenizer, max_seq_len)


def documents(examples: Examples) -> list[list[int]]:
    return [[*tokens.tolist(), int(labels[-1])] for tokens, labels in (examples[i] for i in range(len(examples)))]


def rows_file(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_indexed(
    path: Path, sequences: list[list[int]], bounds: list[int], dtype: Any = np.int32, version: int = 1
) -> Path:
    """<path>.bin and <path>.idx as Megatron-LM's IndexedDatasetBuilder leaves them."""
    arrays = [np.array(sequence, dtype) for sequence in sequences]
    path.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    pointers = np.cumsum([0, *(array.nbytes for array in arrays)])[:-1]
    with open(path.with_suffix(".idx"), "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", version))
        file.write(struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(bounds)))
        file.write(np.array([len(sequence) for sequence in sequences], np.int32).tobytes())
        file.write(pointers.astype(np.int64).tobytes())
        file.write(np.array(bounds, np.int64).tobytes())
    return path.with_suffix(".idx")


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_a_column_of_ids(column: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    examples = load(rows_file(tmp_path, *({column: document} for document in DOCUMENTS)), tokenizer)
    assert documents(examples) == DOCUMENTS
    assert examples.num_labels == sum(len(document) - 1 for document in DOCUMENTS)


def test_labels_and_masks(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokens, expected = [1, 2, 3, 4, 5], ([1, 2, 3], [IGNORE, 3, 4])
    for other in (
        {"labels": [IGNORE, IGNORE, 3, 4, IGNORE]},
        {"labels": [1, IGNORE, 3, 4, IGNORE]},  # nothing predicts the first token
        {"mask": [0, 0, 1, 1, 0]},
        {"mask": [False, False, True, True, False], "labels": None},
    ):
        ((inputs, labels),) = [load(rows_file(tmp_path, {"tokens": tokens, **other}), tokenizer)[0]]
        assert (inputs.tolist(), labels.tolist()) == expected
    row = {"ids": tokens, "loss": [0, 0, 1, 1, 0]}
    examples = load(rows_file(tmp_path, row), tokenizer, column_map={"tokens": "ids", "mask": "loss"})
    assert examples[0][1].tolist() == expected[1]


def test_parquet(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"input_ids": DOCUMENTS}), tmp_path / "a.parquet")
    assert documents(load(tmp_path / "a.parquet", tokenizer)) == DOCUMENTS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ids": [1]}, r"no column 'tokens'; there are: ids\. .*column_map={tokens: <column>}"),
        ({"tokens": None}, r"column 'tokens' is null, expected a list of integers"),
        ({"tokens": "text"}, r"column 'tokens' is a str"),
        ({"tokens": [1.5, 2.0]}, r"column 'tokens' is a list, expected a list of integers"),
        ({"tokens": [[1], [2, 3]]}, r"expected a list of integers"),
        ({"tokens": [1, 2], "labels": [1]}, r"2 tokens and 1 labels"),
        ({"tokens": [1, 2, 3], "labels": [2, 3, -100]}, r"label 0 is 2 and token 0 is 1.*shifted"),
        ({"tokens": [1, 2], "mask": [0, 2]}, r"mask must be 2 times 0 or 1"),
        ({"tokens": [1, 2], "mask": [1]}, r"mask must be 2 times"),
        ({"tokens": [1, 2], "mask": [0, 1], "labels": [1, 2]}, r"both labels and a mask"),
        ({"tokens": [1, -1]}, r"it has the id -1, but the models have"),
        ({"tokens": [1, 10**6]}, r"it has the id 1000000, but the models have"),
        ({"tokens": [1, 2**40]}, r"it has the id 1099511627776"),
    ],
)
def test_rows_of_the_wrong_shape(
    row: dict[str, Any], message: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    path = rows_file(tmp_path, {"tokens": [1, 2]}, row)
    with pytest.raises(ValueError, match=rf"^dataset: line 2 of .*{message}"):
        load(path, tokenizer)
    assert load(path, tokenizer, on_error="skip").counts.num_skipped == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64])
def test_arrays(dtype: Any, tokenizer: tokenizers.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtune.data.token_files._BLOCK_SIZE", 3)
    ids = np.array([*chain.from_iterable(DOCUMENTS), 11, 12], dtype)
    np.save(tmp_path / "a.npy", ids)
    (tmp_path / "b.bin").write_bytes(ids.tobytes())
    expected = [*DOCUMENTS, [11, 12]]  # what comes after the last end is a document, too
    assert documents(load(tmp_path / "a.npy", tokenizer, document_end_id=END)) == expected
    name: Any = np.dtype(dtype).name
    assert documents(load(tmp_path / "b.bin", tokenizer, document_end_id=END, token_dtype=name)) == expected
    assert documents(load(tmp_path / "a.npy", tokenizer, document_end_id=END, split="[50%:]")) == expected[2:]
    joined = load(tmp_path / "a.npy", tokenizer, 4, document_end_id=END, join_documents=True)
    assert [id for document in documents(joined) for id in document[:-1]] == ids[:-1].tolist()
    assert len(load(tmp_path / "a.npy", tokenizer)) == 1, "the end is the eos token unless said otherwise"


def test_a_row_for_each_document(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(12).reshape(3, 4))
    assert documents(load(tmp_path / "a.npy", tokenizer)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(ValueError, match=r"document_end_id=3 cuts .* has documents already"):
        load(tmp_path / "a.npy", tokenizer, document_end_id=3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_indexed(dtype: Any, tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = write_indexed(tmp_path / "set_text_document", DOCUMENTS, [0, 1, 2, 3], dtype)
    for source in (path, path.with_suffix(".bin"), tmp_path):
        assert documents(load(source, tokenizer)) == DOCUMENTS
    assert documents(load(path, tokenizer, split="[1:2]")) == DOCUMENTS[1:2]
    write_indexed(tmp_path / "set_text_document", DOCUMENTS, [0, 2, 2, 3], dtype)
    examples = load(path, tokenizer)
    assert documents(examples) == [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]]
    assert (examples.num_rows, examples.counts.num_unlabelled) == (3, 1)


def damage(tmp_path: Path, what: str) -> Path:
    """A source that cannot be read."""
    path = write_indexed(tmp_path / "a", DOCUMENTS, [0, 1, 2, 3])
    data_path = path.with_suffix(".bin")
    if what == "no data":
        data_path.unlink()
    elif what == "data cut off":
        data_path.write_bytes(data_path.read_bytes()[:-4])
    elif what == "data cut inside an id":
        data_path.write_bytes(data_path.read_bytes()[:-1])
    elif what == "index cut off":
        path.write_bytes(path.read_bytes()[:-8])
    elif what == "no header":
        path.write_bytes(b"MMIDIDX\0\0")
    elif what == "another file":
        path.write_bytes(b"\x80\x04." + bytes(60))
    elif what == "version":
        write_indexed(tmp_path / "a", DOCUMENTS, [0, 1, 2, 3], version=2)
    elif what == "floats":
        write_indexed(tmp_path / "a", DOCUMENTS, [0, 1, 2, 3], np.float32)
    elif what == "bounds":
        write_indexed(tmp_path / "a", DOCUMENTS, [0, 2, 1, 3])
    elif what == "bounds end early":
        write_indexed(tmp_path / "a", DOCUMENTS, [0, 1])
    elif what == "negative":
        content = bytearray(path.read_bytes())
        content[34:38] = struct.pack("<i", -1)
        path.write_bytes(content)
    elif what == "more than there is":
        content = bytearray(path.read_bytes())
        content[18:26] = struct.pack("<Q", 2**60)
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no data", r"a\.bin, which is not there"),
        ("data cut off", r"a sequence that ends at byte 48, but .*a\.bin has 44 bytes"),
        ("data cut inside an id", r"a\.bin has 47 bytes, which is no whole number of int32"),
        ("index cut off", r"a\.idx has 94 bytes, but 3 sequences and 4 document bounds make 102"),
        ("no header", r"does not begin with MMIDIDX"),
        ("another file", r"does not begin with MMIDIDX"),
        ("version", r"has version 2"),
        ("floats", r"type code 7"),
        ("bounds", r"document bounds that do not go from 0 to its 3 sequences"),
        ("bounds end early", r"document bounds"),
        ("negative", r"negative length"),
        ("more than there is", r"sequences .* make"),
    ],
)
def test_damaged_indexed_sets(what: str, message: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(damage(tmp_path, what), tokenizer)


def test_arrays_that_are_refused(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for content, message in [
        (np.zeros(3), "holds float64 in 1 dimensions"),
        (np.zeros((2, 2, 2), int), "in 3 dimensions"),
        (np.array([{"a": 1}], object), "cannot be read as an array"),
    ]:
        np.save(path, content, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            load(path, tokenizer)
    np.save(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read as an array"):
        load(path, tokenizer)
    (tmp_path / "b.bin").write_bytes(bytes(6))
    with pytest.raises(ValueError, match=r"b\.bin does not say how its ids are stored.*token_dtype=uint16"):
        load(tmp_path / "b.bin", tokenizer)
    with pytest.raises(ValueError, match=r"6 bytes, which is no whole number of int32"):
        load(tmp_path / "b.bin", tokenizer, token_dtype="int32")
    with pytest.raises(ValueError, match=r"b\.bin holds ids, not text.*format=tokens"):
        data.load(DatasetConfig(source=str(tmp_path / "b.bin"), format="text"), tokenizer, 8)
    with pytest.raises(ValueError, match=r"token_dtype=uint16 is for \.bin files"):
        load(rows_file(tmp_path, {"tokens": [1]}), tokenizer, token_dtype="uint16")
    indexed = write_indexed(tmp_path / "c", DOCUMENTS, [0, 1, 2, 3])
    for source in (rows_file(tmp_path, {"tokens": [1]}), indexed):
        with pytest.raises(ValueError, match=r"document_end_id=3 cuts .* has documents already"):
            load(source, tokenizer, document_end_id=3)


def test_a_tokenizer_without_an_eos(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    other = copy.copy(tokenizer)
    other.eos_ids = ()
    assert documents(load(rows_file(tmp_path, {"tokens": DOCUMENTS[0]}), other)) == DOCUMENTS[:1]
    np.save(tmp_path / "a.npy", DOCUMENTS[0])
    assert documents(load(tmp_path / "a.npy", other, document_end_id=END)) == DOCUMENTS[:1]
    with pytest.raises(ValueError, match=r"nothing says where a document ends\. Give dataset\.document_end_id"):
        load(tmp_path / "a.npy", other)
