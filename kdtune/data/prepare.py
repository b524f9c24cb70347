"""From the settings of a data set to its examples: first whatever can be refused without a row, then the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from tqdm import tqdm

from kdtune.data import cache, rows
from kdtune.data.blend import Blend
from kdtune.data.config import DatasetConfig, SourceConfig
from kdtune.data.encoding import RowEncoder, too_long
from kdtune.data.examples import Counts, Examples, Part, counted, join, join_documents, number_rows
from kdtune.data.workers import ordered_map
from kdtune.tokenizers import Tokenizer

_CHUNK_SIZE = 64  # rows that are tokenised together, here or in another process


def load(
    cfg: DatasetConfig, tokenizer: Tokenizer, max_seq_len: int, *, name: str = "dataset", vocab_size: int | None = None
) -> Examples | Blend:
    """Reads and tokenises a data set or all sources of a blend, or finds them in their cache_dir.

    Args:
        cfg: where the rows are and what they look like.
        tokenizer: that of the student; teacher and student see the same ids.
        max_seq_len: positions of the longest example; cfg.too_long says what becomes of more.
        name: the section of the settings, for messages.
        vocab_size: rows of the models' embeddings; None: as many as the tokenizer has ids.

    Raises:
        FileNotFoundError: nothing at a source.
        ValueError: settings that exclude each other, no source; a row of the wrong shape, an id outside of the
            vocabulary, no rows, none with a label.
    """
    return open_set(cfg, tokenizer, max_seq_len, name=name, vocab_size=vocab_size).load()


def open_set(
    cfg: DatasetConfig, tokenizer: Tokenizer, max_seq_len: int, *, name: str = "dataset", vocab_size: int | None = None
) -> Source | Sources:
    """Checks the settings of a data set and finds its files. `load` of what it returns reads the rows.

    Arguments and errors are those of `load`, as far as they need no rows.
    """
    if cfg.streaming:
        raise ValueError(
            f"{name}.streaming=true is for training; rows to validate on are the same each time, and few. Leave it "
            f"out, and take a part of them with {name}.split if they are many."
        )
    if cfg.shuffle_buffer is not None:
        raise ValueError(
            f"{name}.shuffle_buffer={cfg.shuffle_buffer} is for {name}.streaming=true; other sets are shuffled as a "
            "whole. Leave it out."
        )
    sections: dict[str, SourceConfig] = {f"{name}.sources.{label}": source for label, source in cfg.sources.items()}
    for section, source in (sections or {name: cfg}).items():
        if cfg.packed and source.join_documents:
            raise ValueError(
                f"{name}.packed=true fills rows with whole documents, {section}.join_documents=true cuts documents "
                "into full rows. Leave one of them out."
            )
    if not cfg.sources:
        return Source(cfg, tokenizer, max_seq_len, name, vocab_size)
    for field in dataclasses.fields(SourceConfig):
        if getattr(cfg, field.name) != getattr(DatasetConfig(), field.name):
            raise ValueError(
                f"{name}.{field.name} says nothing about the blend in {name}.sources: each of them has its own. Set "
                f"{next(iter(sections))}.{field.name}, or leave it out."
            )
    weights = {label: source.weight for label, source in cfg.sources.items() if source.weight is not None}
    without = [label for label in cfg.sources if label not in weights]
    if weights and without:
        raise ValueError(
            f"{name}.sources.{without[0]} has no weight, and others have one. Give all of them a weight, or none: then "
            "each has as many draws as examples."
        )
    sources = {
        label: Source(source, tokenizer, max_seq_len, f"{name}.sources.{label}", vocab_size)
        for label, source in cfg.sources.items()
    }
    return Sources(name, sources, weights or None)


@final
@dataclass(frozen=True)
class Sources:
    """Several of them, opened."""

    name: str
    sources: dict[str, Source]
    weights: dict[str, float] | None  # None: as many draws as examples

    def load(self) -> Blend:
        """All rows of all sources."""
        return Blend(self.name, {label: source.load() for label, source in self.sources.items()}, self.weights)


@final
class Source:
    """Rows that are there, with settings that fit; none of them is tokenised yet.

    Attributes:
        cfg: its settings.
        name: their section, for messages.
        max_seq_len: inputs of an example.
        encode: what turns its rows into examples.
        rows: as they are in the files.
    """

    def __init__(
        self,
        cfg: SourceConfig,
        tokenizer: Tokenizer,
        max_seq_len: int,
        name: str,
        vocab_size: int | None,
        *,
        streaming: bool = False,
    ) -> None:
        """
        Raises:
            FileNotFoundError: nothing at cfg.source.
            ValueError: settings that do not fit each other, the files or the tokenizer.
        """
        if cfg.source is None:
            raise ValueError(f"{name} has no rows: give {name}.source=<file, folder or owner/name on the hub>.")
        if cfg.cache_dir is not None and Path(cfg.cache_dir).is_file():
            raise NotADirectoryError(
                f"{name}.cache_dir={cfg.cache_dir} is a file. Give a folder, which may not exist yet."
            )
        self.cfg = cfg
        self.name = name
        self.max_seq_len = max_seq_len
        self.encode = RowEncoder(cfg, tokenizer, max_seq_len, name, vocab_size)
        end_id = None
        if cfg.format == "tokens":
            own = tokenizer.eos_ids[0] if tokenizer.eos_ids else rows.NO_END
            end_id = own if cfg.document_end_id is None else cfg.document_end_id
        self.rows = rows.read(
            cfg.source,
            split=cfg.split,
            subset=cfg.name,
            separator=cfg.separator,
            token_dtype=cfg.token_dtype,
            document_end_id=end_id,
            streaming=streaming,
            section=name,
        )
        # The rows of an array of two dimensions are as many as it says, those of one as many as are found in it.
        is_flat = any(
            shard.size is None and shard.files[0].suffix.lower() in (".npy", ".bin")
            for shard in self.rows.shards
            if shard.files
        )
        if cfg.document_end_id is not None and not is_flat:
            raise ValueError(
                f"{name}.document_end_id={cfg.document_end_id} cuts arrays of one dimension into documents, and "
                f"{cfg.source} has documents already. Leave it out."
            )

    def key(self) -> dict[str, Any]:
        """All that the tokens depend on: see `cache.key`."""
        cfg, tokenizer = self.cfg, self.encode.tokenizer
        # An id that the models do not have stops the run, also when the rows are cached. Only where such rows are left
        # out are there other rows for other models; an id that comes of text is never above the tokenizer's own.
        limit = self.encode.vocab_size
        limit = limit if cfg.format == "tokens" else min(limit, tokenizer.vocab_size)
        resolved = dataclasses.replace(cfg, too_long=too_long(cfg))
        return cache.key(resolved, self.rows, tokenizer, self.max_seq_len, limit if cfg.on_error == "skip" else None)

    def load(self) -> Examples:
        """All rows, tokenised now or found in the cache; says which, and which rows were skipped."""
        if self.cfg.cache_dir is None:
            examples = join(self.name, self.max_seq_len, self._parts())
        else:
            examples = self._cached(self.cfg.cache_dir)
        for place in examples.counts.places:
            print(f"{self.name}: skipped {place}")
        examples.counts.warn(self.name, self.max_seq_len)
        examples.source = self.rows
        return examples

    def _parts(self) -> Iterator[Part]:
        items = self.rows.items()
        chunks = iter(lambda: list(islice(items, _CHUNK_SIZE)), [])
        parts: Iterator[Part] = ordered_map(self.encode, chunks, self.cfg.num_workers)
        if self.cfg.join_documents:
            parts = join_documents(parts, self.max_seq_len)
        counts, num_examples = Counts(), 0
        what = {"desc": f"tokenizing {self.name}", "total": self.rows.size(), "unit": " rows"}
        with tqdm(**what, delay=2.0, leave=False, disable=None) as bar:
            for part in number_rows(parts):
                bar.update(part.counts.num_rows)
                counts.add(part.counts)
                num_examples += len(part.sizes)
                yield part
        self.check(counts, num_examples)  # at the end of the rows, and before a cached set gets its name

    def _cached(self, cache_dir: str) -> Examples:
        key = self.key()
        folder = cache.folder(cache_dir, str(self.cfg.source), key)
        for _ in range(2):  # what was written may be gone: another process took its predecessor for damaged
            if (examples := self._read(folder, key)) is not None:
                print(f"{self.name}: tokenised rows found in {folder}")
                return examples
            cache.write(folder, key, self._parts())
            if (examples := self._read(folder, key)) is not None:
                print(f"{self.name}: tokenised rows written to {folder}")
                return examples
        raise OSError(f"{folder} was written twice and is not there. Does another process delete it?")

    def _read(self, folder: Path, key: dict[str, Any]) -> Examples | None:
        try:
            examples = cache.read(folder, key, self.name, self.max_seq_len)
        except cache.Damaged as error:
            print(f"{self.name}: {error}. The rows are tokenised again.")
            cache.remove(folder)
            return None
        if examples is not None and examples.counts.max_id >= self.encode.vocab_size:
            raise ValueError(
                f"{self.name}: a row of {self.cfg.source} has {self.encode.outside(examples.counts.max_id)} "
                f"({self.name}.on_error=skip leaves such rows out, and counts them.)"
            )
        return examples

    def check(self, counts: Counts, num_examples: int, which: str = "") -> None:
        """Refuses rows that make no example.

        Args:
            counts: what became of the rows.
            num_examples: how many examples they made.
            which: of the rows were read, such as "first "; empty: all.

        Raises:
            ValueError: there is nothing to train on, and why.
        """
        cfg, num_rows, limit = self.cfg, counts.num_rows, f"tokenizer.max_seq_len={self.max_seq_len}"
        if num_rows == 0:
            where = f" in {self.name}.split={cfg.split}" if cfg.split else ""
            raise ValueError(f"{self.name}: {cfg.source} has no rows{where}.")
        if num_examples:
            return
        found = f"{self.name}: the {which}{counted(num_rows, 'row')} of {cfg.source}"
        if counts.num_skipped == num_rows:
            fate = "was skipped" if num_rows == 1 else "were all skipped, the first"
            raise ValueError(f"{found} {fate}: {counts.places[0]}")
        skipped = f"skipped (the first: {''.join(counts.places[:1])})"
        fates = (
            (counts.num_skipped, skipped),
            (counts.num_too_long, f"longer than {limit} and dropped"),
            (counts.num_prompt_too_long, f"without anything to predict within {limit}"),
            (counts.num_unlabelled, "without anything to predict"),
        )
        reasons = "; ".join(f"{number:,} {'is' if number == 1 else 'are'} {fate}" for number, fate in fates if number)
        raise ValueError(
            f"{found} {'has' if num_rows == 1 else 'have'} nothing to train on: {reasons}. Look at the rows, or raise "
            "tokenizer.max_seq_len."
        )
