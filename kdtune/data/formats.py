"""Rows to tokens: what is the prompt, what is the answer, and which tokens are to be predicted."""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdtune.data import token_files
from kdtune.data.chats import Labelled, check_stop, encode_turns, read_messages, split_turns
from kdtune.data.config import SourceConfig
from kdtune.data.examples import Encoded
from kdtune.data.rows import BadRow
from kdtune.tokenizers import Tokenizer

Row = Mapping[str, Any]

# Formats whose rows are documents: every token of them is read for its own sake.
DOCUMENTS = ("text", "tokens")

# Stanford Alpaca's prompts (Taori et al. 2023), which most instruction data of this form was used with.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

_COLUMNS = {
    "instruct": ("instruction", "input", "output"),
    "chat": ("messages", "tools"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("tokens", "labels", "mask"),
}
# By which a format is recognised.
_NEEDED = (
    ("instruct", ("instruction", "output")),
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("completion", ("prompt", "completion")),
    ("text", ("text",)),
    ("tokens", ("tokens",)),
    ("tokens", ("input_ids",)),
)


@dataclass(frozen=True)
class _Columns:
    """Where the values of a format are in the rows.

    Attributes:
        section: the section of the settings, for messages.
        names: the format's column -> the column in the rows, where they differ.
    """

    section: str
    names: Mapping[str, str]

    def value(self, row: Row, name: str, column: str | None = None) -> Any:
        """What a row has under one of the format's names, in the column that is meant by it."""
        column = column or self.names.get(name, name)
        if column not in row:
            raise BadRow(
                "missing column",
                f"no column {column!r}; there are: {', '.join(map(str, row)) or '(none)'}.{self._looks_like(row)} If "
                f"another one is meant, say so: {self.section}.column_map={{{name}: <column>}}.",
            )
        if row[column] is None:
            raise BadRow("null", f"column {column!r} is null, expected a value.")
        return row[column]

    def text(self, row: Row, name: str) -> str:
        value = self.value(row, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            column = self.names.get(name, name)
            raise BadRow("wrong type", f"column {column!r} is a {type(value).__name__}, expected text.")
        return value

    def _looks_like(self, row: Row) -> str:
        """The format that has these columns, if there is one."""
        formats = (name for name, needed in _NEEDED if set(needed) <= row.keys())
        return next((f" They look like {self.section}.format={name}." for name in formats), "")


def check_settings(cfg: SourceConfig, section: str) -> None:
    """Refuses settings that say nothing for the format.

    Raises:
        ValueError: names the setting, and what to do.
    """
    others = {
        "prompt_template": ("instruct", cfg.prompt_template is not None),
        "chat_template": ("chat", cfg.chat_template is not None),
        "train_on_last_turn": ("chat", cfg.train_on_last_turn),
        "document_end_id": ("tokens", cfg.document_end_id is not None),
        "token_dtype": ("tokens", cfg.token_dtype is not None),
    }
    for setting, (format, is_given) in others.items():
        if is_given and cfg.format != format:
            raise ValueError(f"{section}.{setting} is for {section}.format={format}, not {cfg.format}. Leave it out.")
    known = _COLUMNS[cfg.format]
    if cfg.prompt_template is not None:
        template = _parse_template(cfg.prompt_template, section)
        known = (*(name for _, name in template if name is not None), "output")
    unknown = sorted(set(cfg.column_map) - set(known))
    if unknown:
        raise ValueError(
            f"{section}.column_map has {unknown[0]!r}, which {section}.format={cfg.format} does not read. It maps the "
            f"names of the format, or of prompt_template, to the columns of the rows; the names are {', '.join(known)}."
        )
    if cfg.train_on_input and cfg.format in DOCUMENTS:
        raise ValueError(
            f"{section}.train_on_input=true says nothing for {section}.format={cfg.format}, whose rows have no prompt. "
            "Leave it out."
        )
    if cfg.train_on_input and cfg.train_on_last_turn:
        raise ValueError(
            f"{section}.train_on_input=true labels every turn, {section}.train_on_last_turn=true the assistant's last "
            "one only. Give one."
        )
    if cfg.join_documents and cfg.format not in DOCUMENTS:
        raise ValueError(
            f"{section}.join_documents=true is for {section}.format=text and tokens: a row of format={cfg.format} is "
            f"an example for itself. Leave it out; {section.partition('.')[0]}.packed=true puts several into a row "
            "that do not see each other."
        )
    if cfg.join_documents and cfg.too_long:
        raise ValueError(
            f"{section}.join_documents=true cuts all documents into full rows, so that "
            f"{section}.too_long={cfg.too_long} says nothing. Leave one of them out."
        )
    for setting, text in (("prompt_template", cfg.prompt_template), ("separator", cfg.separator)):
        if text and "\\n" in text:
            warnings.warn(
                f"{section}.{setting} has a backslash and an n in it, which are two characters and no line break. If a "
                f"line break is meant, put double quotes inside single ones: '{section}.{setting}=\"...\\n...\"'.",
                stacklevel=1,  # one place: said once
            )


def row_encoder(cfg: SourceConfig, tokenizer: Tokenizer, section: str) -> Callable[[Row], Encoded]:
    """The function that turns one row into tokens.

    Args:
        cfg: settings that `check_settings` let pass.
        tokenizer: with the chat template that the settings name.
        section: of the settings, for messages.

    Raises:
        ValueError: the tokenizer lacks what the format needs. The function itself raises ValueError for a row of the
            wrong shape.
    """
    columns = _Columns(section, cfg.column_map)
    if cfg.format == "chat":
        check_stop(tokenizer)  # raises if there is no template
        labelled: Labelled = "all" if cfg.train_on_input else "last" if cfg.train_on_last_turn else "answers"
        return lambda row: _encode_chat(row, columns, tokenizer, labelled)
    if cfg.format == "tokens":
        return lambda row: token_files.encode(row, cfg.column_map, section)
    eos_id = tokenizer.eos_id  # raises if there is none
    if cfg.format == "text":
        return lambda row: _encode_text(columns.text(row, "text"), tokenizer, eos_id)
    if cfg.format == "completion":
        return lambda row: _encode_pair(
            columns.text(row, "prompt"), columns.text(row, "completion"), cfg.train_on_input, tokenizer, eos_id
        )
    template = None if cfg.prompt_template is None else _parse_template(cfg.prompt_template, section)
    return lambda row: _encode_pair(
        _alpaca(row, columns) if template is None else _fill(template, row, columns),
        columns.text(row, "output"),
        cfg.train_on_input,
        tokenizer,
        eos_id,
    )


def _encode_pair(prompt: str, answer: str, train_on_input: bool, tokenizer: Tokenizer, eos_id: int) -> Encoded:
    if not answer.strip():
        return []
    # The prompt is encoded by itself, as it will be when the model is asked: no token reaches into the answer.
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = [*tokenizer.encode(answer, bos=False, continues=bool(prompt)), eos_id]
    return [(prompt_ids + answer_ids, [train_on_input] * len(prompt_ids) + [True] * len(answer_ids))]


def _encode_text(text: str, tokenizer: Tokenizer, eos_id: int) -> Encoded:
    if not text:
        return []
    ids = [*tokenizer.encode(text), eos_id]
    return [(ids, [True] * len(ids))]


def _encode_chat(row: Row, columns: _Columns, tokenizer: Tokenizer, labelled: Labelled) -> Encoded:
    column = columns.names.get("messages")
    if column is None:
        column = "messages" if "messages" in row or "conversations" not in row else "conversations"
    messages = read_messages(columns.value(row, "messages", column), column)
    tools_column = columns.names.get("tools", "tools")
    if "tools" in columns.names and tools_column not in row:
        columns.value(row, "tools")  # raises; rows may go without tools, not under a name that was given
    return encode_turns(split_turns(messages, row.get(tools_column), tokenizer, labelled), tokenizer)


def _alpaca(row: Row, columns: _Columns) -> str:
    instruction = columns.text(row, "instruction")
    column = columns.names.get("input", "input")
    context = columns.text(row, "input") if row.get(column) is not None else ""  # parquet and csv have it in each row
    template = ALPACA_WITH_INPUT if context else ALPACA
    return template.format(instruction=instruction, input=context)


def _parse_template(template: str, section: str) -> list[tuple[str, str | None]]:
    """A template as pieces of text, each with the name of the column behind it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{section}.prompt_template: {error}. Columns stand in braces; a brace itself is written twice."
        ) from None
    for _, name, spec, conversion in parts:
        # A column's name and nothing else: format()'s attributes and indices would reach into Python objects.
        if name is not None and (not name or spec or conversion or set(name) & set(".[]")):
            raise ValueError(
                f"{section}.prompt_template: {{{name}}} is not the name of a column. A brace itself is written twice."
            )
    return [(text, name) for text, name, _, _ in parts]


def _fill(template: list[tuple[str, str | None]], row: Row, columns: _Columns) -> str:
    return "".join(text + ("" if name is None else columns.text(row, name)) for text, name in template)
