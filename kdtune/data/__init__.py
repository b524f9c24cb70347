"""Rows of any common form to batches of tokens and labels.

`load_run` makes of a recipe's settings what its run reads. Of its parts, `load(cfg, tokenizer, max_seq_len)` reads and
tokenises a data set once (`Examples`, or a blend of several), and `Loader` deals it out in optimizer steps, shuffled
and resumable; `Stream` and `StreamLoader` do so with rows too many to look at first. Labels are shifted here and
nowhere else: the label at position i is the token at i + 1, or IGNORE.
"""

from kdtune.data.batch import IGNORE, Batch, Keys, Share, collate, collate_packed, count_labels, count_tokens
from kdtune.data.blend import Blend
from kdtune.data.chats import trained_template
from kdtune.data.config import DatasetConfig
from kdtune.data.examples import Examples
from kdtune.data.loader import Loader, ValBatches, batches
from kdtune.data.prepare import load
from kdtune.data.run import RunData, batches_by_source, check_validation, load_run
from kdtune.data.stream import Stream, StreamLoader

__all__ = [
    "IGNORE",
    "Batch",
    "Blend",
    "DatasetConfig",
    "Examples",
    "Keys",
    "Loader",
    "RunData",
    "Share",
    "Stream",
    "StreamLoader",
    "ValBatches",
    "batches",
    "batches_by_source",
    "check_validation",
    "collate",
    "collate_packed",
    "count_labels",
    "count_tokens",
    "load",
    "load_run",
    "trained_template",
]
