"""From the settings of a data set to its examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice

from tqdm import tqdm

from kdtune.data import cache, rows
from kdtune.data.blend import Blend
from kdtune.data.chats import with_template
from kdtune.data.config import DatasetConfig, SourceConfig
from kdtune.data.encoding import RowEncoder
from kdtune.data.examples import Counts, Examples, Part, join, join_documents
from kdtune.data.workers import ordered_map
from kdtune.tokenizers import Tokenizer

_CHUNK_SIZE = 256  # rows that are tokenised together, here or in another process


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
        ValueError: no source; a row of the wrong shape, an id outside of the vocabulary, no rows, none with a label.
    """
    if cfg.streaming:
        raise ValueError(
            f"{name}.streaming=true is for training; rows to validate on are the same each time, and few. Leave it "
            "out, and take a part of them with split if they are many."
        )
    if cfg.packed and any(source.join_documents for source in (cfg.sources.values() or [cfg])):
        raise ValueError(
            f"{name}.packed=true fills rows with whole documents, join_documents=true cuts documents into full rows. "
            "Leave one of them out."
        )
    if not cfg.sources:
        return _load_source(cfg, tokenizer, max_seq_len, name, vocab_size)
    for field in dataclasses.fields(SourceConfig):
        if getattr(cfg, field.name) != getattr(DatasetConfig(), field.name):
            raise ValueError(
                f"{name}.{field.name} says nothing about the blend in {name}.sources: each of them has its own. Set "
                f"{name}.sources.{next(iter(cfg.sources))}.{field.name}, or leave it out."
            )
    sources = {
        label: _load_source(source, tokenizer, max_seq_len, f"{name}.sources.{label}", vocab_size)
        for label, source in cfg.sources.items()
    }
    return Blend(name, sources, {label: source.weight for label, source in cfg.sources.items()})


def _load_source(
    cfg: SourceConfig, tokenizer: Tokenizer, max_seq_len: int, name: str, vocab_size: int | None
) -> Examples:
    if cfg.source is None:
        raise ValueError(f"{name} has no rows: give {name}.source=<file, folder or owner/name on the hub>.")
    encode = RowEncoder(cfg, tokenizer, max_seq_len, name, vocab_size)
    found = read_rows(cfg, tokenizer)
    parts = _parts(cfg, found, encode, max_seq_len, name)
    if cfg.cache_dir is None:
        examples = join(name, max_seq_len, parts)
        _check(cfg, examples.counts, len(examples), max_seq_len, name)
    else:
        key = cache.key(cfg, found, with_template(tokenizer, cfg), max_seq_len, vocab_size)
        examples = _cached(cfg, cfg.cache_dir, key, parts, max_seq_len, name)
    for place in examples.counts.places:
        print(f"{name}: skipped {place}")
    return examples


def read_rows(cfg: SourceConfig, tokenizer: Tokenizer, *, streaming: bool = False) -> rows.Rows:
    """The rows that the settings name."""
    assert cfg.source is not None
    end_id = None
    if cfg.format == "tokens":
        own = tokenizer.eos_ids[0] if tokenizer.eos_ids else rows.NO_END
        end_id = own if cfg.document_end_id is None else cfg.document_end_id
    elif cfg.document_end_id is not None or cfg.token_dtype is not None:
        which = "document_end_id" if cfg.document_end_id is not None else "token_dtype"
        raise ValueError(f"{which} is for format=tokens, not {cfg.format}. Leave it out.")
    found = rows.read(
        cfg.source,
        split=cfg.split,
        subset=cfg.name,
        separator=cfg.separator,
        token_dtype=cfg.token_dtype,
        document_end_id=end_id,
        streaming=streaming,
    )
    if cfg.document_end_id is not None and not any(file.suffix.lower() in (".npy", ".bin") for file in found.files[:1]):
        raise ValueError(
            f"document_end_id={cfg.document_end_id} cuts .npy and .bin files into documents, and {cfg.source} has "
            "documents already. Leave it out."
        )
    return found


def _parts(cfg: SourceConfig, found: rows.Rows, encode: RowEncoder, max_seq_len: int, name: str) -> Iterator[Part]:
    items = found.items()
    chunks = iter(lambda: list(islice(items, _CHUNK_SIZE)), [])
    parts = ordered_map(encode, chunks, cfg.num_workers)
    with tqdm(desc=f"tokenizing {name}", total=found.size(), unit=" rows", delay=2.0, leave=False, disable=None) as bar:

        def counted() -> Iterator[Part]:
            for part in parts:
                bar.update(part.counts.num_rows)
                yield part

        yield from join_documents(counted(), max_seq_len) if cfg.join_documents else counted()


def _cached(
    cfg: SourceConfig, cache_dir: str, key: dict[str, object], parts: Iterator[Part], max_seq_len: int, name: str
) -> Examples:
    assert cfg.source is not None
    folder = cache.folder(cache_dir, cfg.source, key)
    try:
        examples = cache.read(folder, key, name, max_seq_len)
    except cache.Damaged as error:
        print(f"{name}: {error}. The rows are tokenised again.")
        cache.remove(folder)
        examples = None
    if examples is not None:
        return examples

    def checked() -> Iterator[Part]:
        counts, num_examples = Counts(), 0
        for part in parts:
            counts.add(part.counts)
            num_examples += len(part.sizes)
            yield part
        _check(cfg, counts, num_examples, max_seq_len, name)  # before the set gets its name

    cache.write(folder, key, checked())
    examples = cache.read(folder, key, name, max_seq_len)
    assert examples is not None
    return examples


def _check(cfg: SourceConfig, counts: Counts, num_examples: int, max_seq_len: int, name: str) -> None:
    if counts.num_rows == 0:
        raise ValueError(f"{name}: {cfg.source} has no rows" + (f" in split={cfg.split}." if cfg.split else "."))
    if num_examples == 0:
        skipped = f" {counts.num_skipped:,} were skipped, the first: {counts.places[0]}" if counts.skipped else ""
        raise ValueError(
            f"{name}: none of the {counts.num_rows:,} rows of {cfg.source} has anything to train on: either they have "
            f"no answers, or their prompts alone are longer than max_seq_len={max_seq_len}. Look at the rows, or raise "
            f"tokenizer.max_seq_len.{skipped}"
        )
