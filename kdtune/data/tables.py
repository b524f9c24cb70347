"""Rows of data sets that the `datasets` library holds: saved on disk, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdtune.data.rows import BATCH_SIZE, Row, Shard


def saved(path: Path) -> Shard:
    """What `datasets` saved with `save_to_disk`."""
    import datasets

    return _table(datasets.load_from_disk(str(path)), str(path))


def hub(source: str, subset: str | None, split: str, streaming: bool) -> list[Shard]:
    """A data set of the hub, fetched now, or with `streaming` as its rows are asked for.

    Raises:
        ValueError: the hub did not give it.
    """
    import datasets
    import huggingface_hub

    pinned = {}
    try:
        if streaming:
            # A set that changes on the hub is another one to the checkpoints of a run.
            pinned = {"streaming": True, "revision": huggingface_hub.dataset_info(source).sha}
        rows = datasets.load_dataset(source, subset, split=split, **pinned)
    except Exception as error:  # a dozen kinds, from the network, the hub and the data set itself
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ValueError(
            "no file or folder of that name here, and the Hugging Face hub did not give such a data set (subset "
            f"{subset or 'default'}, split {split}): {type(error).__name__}: {reason}"
        ) from None
    if streaming:
        name, num_shards = f"{source}@{str(pinned['revision'])[:8]} ({split})", rows.num_shards
        return [_remote(rows.shard(num_shards, i), f"{name}, shard {i + 1}") for i in range(num_shards)]
    return [_table(rows, f"{source} ({split})")]


def _remote(stream: Any, source: str) -> Shard:
    def read(start: int) -> Iterator[Row]:
        for number, columns in enumerate(stream.skip(start) if start else stream, start=start + 1):
            yield Row(columns, source, "row", number)

    return Shard(source, [], read, lambda: sum(1 for _ in stream))


def _table(table: Any, source: str) -> Shard:
    def read(start: int) -> Iterator[Row]:
        number = start
        for batch in table.select(range(start, len(table))).iter(BATCH_SIZE):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(dict(zip(batch, values, strict=True)), source, "row", number)

    files = [Path(file["filename"]) for file in table.cache_files]
    return Shard(source, files, read, lambda: len(table), len(table))
