"""Rows of any common form to batches of tokens and labels.

`load(cfg, tokenizer, max_seq_len)` reads and tokenises a data set once (`Examples`); `Loader` deals it out in
optimizer steps, shuffled and resumable; `batches` goes through it in order. Labels are shifted here and nowhere else:
the label at position i is the token at i + 1, or IGNORE.
"""

from kdtune.data.batch import IGNORE, Batch, collate, collate_packed, count_labels
from kdtune.data.chats import trained_template
from kdtune.data.config import DatasetConfig
from kdtune.data.examples import Examples
from kdtune.data.loader import Loader, batches, val_batches
from kdtune.data.prepare import load
from kdtune.data.run import RunData
from kdtune.data.stream import Stream, StreamLoader, load_or_stream, make_loader

__all__ = [
    "IGNORE",
    "Batch",
    "DatasetConfig",
    "Examples",
    "Loader",
    "RunData",
    "Stream",
    "StreamLoader",
    "batches",
    "collate",
    "collate_packed",
    "count_labels",
    "load",
    "load_or_stream",
    "make_loader",
    "trained_template",
    "val_batches",
]
