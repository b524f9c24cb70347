"""Rows to examples, here or in other processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from kdtune.data.chats import with_template
from kdtune.data.config import SourceConfig
from kdtune.data.examples import Encoded, Part, PartBuilder, TooLong, whole_documents
from kdtune.data.formats import DOCUMENTS, check_settings, row_encoder
from kdtune.data.rows import BadRow, Row
from kdtune.tokenizers import Tokenizer


def too_long(cfg: SourceConfig) -> TooLong:
    """What becomes of rows above max_seq_len, if the settings leave it open, too."""
    return cfg.too_long or ("split" if cfg.format in DOCUMENTS else "truncate")


@final
class RowEncoder:
    """Turns rows into examples. It can be sent to other processes.

    Attributes:
        tokenizer: with the chat template that the settings name.
        vocab_size: what all ids have to be below.
    """

    def __init__(
        self, cfg: SourceConfig, tokenizer: Tokenizer, max_seq_len: int, name: str, vocab_size: int | None
    ) -> None:
        """
        Args:
            cfg: what the rows look like.
            tokenizer: that of the student.
            max_seq_len: inputs of an example.
            name: the section of the settings, for messages.
            vocab_size: rows of the models' embeddings; None: as many as the tokenizer has ids.

        Raises:
            ValueError: settings that do not fit the format, or a tokenizer that lacks what the format needs.
        """
        self._arguments = (cfg, tokenizer, max_seq_len, name, vocab_size)
        check_settings(cfg, name)
        self.tokenizer = with_template(tokenizer, cfg, name)
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        try:
            self._encode = row_encoder(cfg, self.tokenizer, name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self._name = name
        self._on_error = cfg.on_error
        self._is_text = cfg.format in DOCUMENTS
        self._join_documents = cfg.join_documents
        self._max_seq_len = max_seq_len
        self._too_long = too_long(cfg)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, self._arguments

    def __call__(self, rows: Sequence[Row]) -> Part:
        """The examples of some rows.

        Raises:
            BadRow: one cannot be used, and on_error=raise. The message names its place.
        """
        builder = PartBuilder(self._max_seq_len, self._too_long)
        documents: list[Encoded] = []
        for row in rows:
            try:
                encoded = self._encode_row(row)
                highest = self._highest_id(encoded)
            except ValueError as error:
                kind = error.kind if isinstance(error, BadRow) else "refused"
                message = str(error) if row.error else f"{row.place}: {error}"
                if self._on_error == "raise":
                    hint = f"{self._name}.on_error=skip leaves such rows out, and counts them."
                    raise BadRow(kind, f"{self._name}: {message} ({hint})") from None
                builder.counts.skip(kind, message)
                continue
            builder.counts.max_id = max(builder.counts.max_id, highest)
            if self._join_documents:
                documents.append(encoded)
            else:
                builder.add(encoded)
        return whole_documents(documents, builder.counts) if self._join_documents else builder.finish()

    def _encode_row(self, row: Row) -> Encoded:
        if row.error is not None:
            raise row.error
        encoded = self._encode(row.columns)
        if not encoded and not self._is_text:
            raise BadRow("empty answer", "there is no answer, or it is empty, so that there is nothing to learn.")
        return encoded

    def _highest_id(self, encoded: Encoded) -> int:
        arrays = [np.asarray(tokens, np.int64) for tokens, _ in encoded]
        lowest = min((int(ids.min(initial=0)) for ids in arrays), default=0)
        highest = max((int(ids.max(initial=0)) for ids in arrays), default=0)
        if lowest < 0 or highest >= self.vocab_size:
            raise BadRow("id outside of the vocabulary", f"it has {self.outside(lowest if lowest < 0 else highest)}")
        return highest

    def outside(self, id: int) -> str:
        """What to say of an id that the models do not have."""
        piece = self.tokenizer.piece(id) if id in self.tokenizer.ids() else None
        what = f"the id {id}" if piece is None else f"the token {piece!r} with id {id}"
        return (
            f"{what}, but the models have {self.vocab_size} ids. Tokenizer and models do not belong together, or the "
            "row holds a special token that they were not built with."
        )


def _again(*arguments: Any) -> RowEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process has given them
        return RowEncoder(*arguments)
