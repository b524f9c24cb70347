"""Rows to examples, here or in other processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from kdtune.data.config import SourceConfig
from kdtune.data.examples import Encoded, Part, PartBuilder, TooLong, whole_documents
from kdtune.data.formats import row_encoder
from kdtune.data.rows import BadRow, Row
from kdtune.tokenizers import Tokenizer

# Formats whose rows are documents: every token of them is read for its own sake.
_DOCUMENTS = ("text", "tokens")


@final
class RowEncoder:
    """Turns rows into examples. It can be sent to other processes."""

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
        try:
            self._encode = row_encoder(cfg, tokenizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self._name = name
        self._on_error = cfg.on_error
        self._is_text = cfg.format in _DOCUMENTS
        self._join_documents = cfg.join_documents
        self._max_seq_len = max_seq_len
        self._too_long: TooLong = cfg.too_long or ("split" if self._is_text else "truncate")
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        if cfg.join_documents and not self._is_text:
            raise ValueError(
                f"{name}.join_documents=true is for format=text and tokens: a row of format={cfg.format} is an example "
                f"for itself. Leave it out; {name}.packed=true puts several into a row that do not see each other."
            )
        if cfg.join_documents and cfg.too_long:
            raise ValueError(
                f"{name}.join_documents=true cuts all documents into full rows, so that too_long={cfg.too_long} says "
                "nothing. Leave one of them out."
            )

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
            except ValueError as error:
                kind = error.kind if isinstance(error, BadRow) else "refused"
                message = str(error) if row.error else f"{row.place}: {error}"
                if self._on_error == "raise":
                    hint = f"{self._name}.on_error=skip leaves such rows out, and counts them."
                    raise BadRow(kind, f"{self._name}: {message} ({hint})") from None
                builder.counts.skip(kind, message)
                continue
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
        for tokens, _ in encoded:
            ids = np.asarray(tokens, np.int64)
            lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=0))
            if lowest < 0 or highest >= self._vocab_size:
                raise BadRow("id outside of the vocabulary", self._outside(lowest if lowest < 0 else highest))
        return encoded

    def _outside(self, id: int) -> str:
        piece = self._tokenizer.piece(id) if id in self._tokenizer.ids() else None
        what = f"the id {id}" if piece is None else f"the token {piece!r} with id {id}"
        return (
            f"it has {what}, but the models have {self._vocab_size} ids. Tokenizer and models do not belong together, "
            "or the row holds a special token that they were not built with."
        )


def _again(*arguments: Any) -> RowEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process has given them
        return RowEncoder(*arguments)
