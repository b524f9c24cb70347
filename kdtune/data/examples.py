"""A tokenised data set, held compactly."""

from __future__ import annotations

import zlib
from array import array
from typing import final

import torch
from torch import Tensor
from tqdm import tqdm

from kdtune.data import rows
from kdtune.data.batch import IGNORE
from kdtune.data.config import DatasetConfig
from kdtune.data.formats import row_encoder
from kdtune.tokenizers import Tokenizer


@final
class Examples:
    """Tokenised rows: `examples[i]` is (tokens [s], labels [s]), int64, labels already shifted.

    A row is stored up to its last labelled token (what comes after it cannot change any loss), in flat tensors of five
    bytes per token, so that a million rows are three objects and not a million.

    Attributes:
        name: which data set this is, for messages.
        num_rows: rows read; len() is smaller where rows were dropped, greater where a row makes several examples.
        num_truncated: rows that were longer than max_seq_len.
        num_dropped: rows in which nothing has a label, as read or after truncation.
        max_seq_len: the limit that was applied.
    """

    def __init__(self, name: str, max_seq_len: int) -> None:
        self.name = name
        self.max_seq_len = max_seq_len
        self.num_rows = 0
        self.num_truncated = 0
        self.num_dropped = 0
        self._tokens = array("i")
        self._is_label = bytearray()  # 1: this token is to be predicted
        self._offsets = array("q", [0])

    def add_row(self, encoded: list[tuple[list[int], list[bool]]]) -> None:
        """Takes the examples that one row makes: (tokens, whether each is to be predicted)."""
        self.num_rows += 1
        was_cut, was_kept = False, False
        for tokens, is_label in encoded:
            # Nothing comes before the first token, so that it cannot be predicted.
            labelled = [i for i in range(1, len(tokens)) if is_label[i]]
            if not labelled:
                continue
            # max_seq_len counts inputs; the last label needs no position of its own.
            was_cut |= labelled[-1] > self.max_seq_len
            length = max((i for i in labelled if i <= self.max_seq_len), default=-1) + 1
            if length == 0:
                continue
            was_kept = True
            self._tokens.extend(tokens[:length])
            self._is_label.append(0)
            self._is_label.extend(is_label[1:length])
            self._offsets.append(len(self._tokens))
        self.num_truncated += was_cut and was_kept
        self.num_dropped += not was_kept

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        start, stop = self._offsets[i], self._offsets[i + 1]
        tokens = torch.tensor(self._tokens[start:stop], dtype=torch.int64)
        is_label = torch.frombuffer(self._is_label[start + 1 : stop], dtype=torch.bool)
        return tokens[:-1], torch.where(is_label, tokens[1:], IGNORE)

    def length(self, i: int) -> int:
        """Positions of example i."""
        return self._offsets[i + 1] - self._offsets[i] - 1

    @property
    def num_tokens(self) -> int:
        """Positions of all examples together, without padding."""
        return len(self._tokens) - len(self)

    @property
    def num_labels(self) -> int:
        """Scored positions of all examples together."""
        return sum(self._is_label)

    @property
    def fingerprint(self) -> int:
        """Changes when any token, label or border does: a resumed run checks that it reads the same data."""
        return zlib.crc32(self._offsets.tobytes(), zlib.crc32(self._is_label, zlib.crc32(self._tokens.tobytes())))

    def summary(self) -> str:
        """One line: how much there is, and what was cut or dropped."""
        longest = max(self.length(i) for i in range(len(self)))
        parts = [f"{self.name}: {self.num_rows:,} rows"]
        if len(self) != self.num_rows - self.num_dropped:
            parts.append(f"{len(self):,} examples")
        share = self.num_labels / self.num_tokens
        parts.append(f"{self.num_tokens:,} tokens ({share:.0%} with a label), longest {longest:,}")
        if self.num_truncated:
            parts.append(f"{self.num_truncated:,} rows truncated to {self.max_seq_len:,} tokens")
        if self.num_dropped:
            parts.append(f"{self.num_dropped:,} rows dropped (nothing in them has a label)")
        return ", ".join(parts)


def load(
    cfg: DatasetConfig, tokenizer: Tokenizer, max_seq_len: int, *, name: str = "dataset", vocab_size: int | None = None
) -> Examples:
    """Reads and tokenises a data set.

    Args:
        cfg: where the rows are and what they look like.
        tokenizer: that of the student; teacher and student see the same ids.
        max_seq_len: positions of the longest row; longer rows are truncated (documents of the text format are cut into
            several examples instead).
        name: the section of the settings, for messages.
        vocab_size: rows of the models' embeddings; None: any id of the tokenizer will do.

    Raises:
        FileNotFoundError: nothing at cfg.source.
        ValueError: a row of the wrong shape, an id outside of the vocabulary, no rows, or none with a label.
    """
    encode = row_encoder(cfg, tokenizer, max_seq_len)
    examples = Examples(name, max_seq_len)
    found = rows.read(cfg.source, split=cfg.split, subset=cfg.name, separator=cfg.separator)
    if not found:
        raise ValueError(f"{name}: {cfg.source} has no rows" + (f" in split={cfg.split}." if cfg.split else "."))
    for row in tqdm(found, desc=f"tokenizing {name}", unit=" rows", delay=2.0, leave=False, disable=None):
        try:
            encoded = encode(row.columns)
        except ValueError as error:
            raise ValueError(f"{name}: {row.place}: {error}") from None
        for tokens, _ in encoded:
            if vocab_size is not None and max(tokens, default=0) >= vocab_size:
                raise ValueError(
                    f"{name}: {row.place} has the token {tokenizer.piece(max(tokens))!r} with id {max(tokens)}, but "
                    f"the models have {vocab_size} ids. Tokenizer and models do not belong together, or the row "
                    "holds a special token that they were not built with."
                )
        examples.add_row(encoded)
    if len(examples) == 0:
        raise ValueError(
            f"{name}: none of the {examples.num_rows:,} rows of {cfg.source} has anything to train on: either their "
            f"answers are empty, or their prompts alone are longer than max_seq_len={max_seq_len}. Look at the "
            "rows, or raise tokenizer.max_seq_len."
        )
    return examples
