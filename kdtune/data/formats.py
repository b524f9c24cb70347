"""Rows to tokens: what is the prompt, what is the answer, and which tokens are to be predicted."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from kdtune.data import token_files
from kdtune.data.chats import Labelled, check_stop, encode_turns, read_messages, split_turns, with_template
from kdtune.data.config import SourceConfig
from kdtune.data.examples import Encoded
from kdtune.data.rows import BadRow
from kdtune.tokenizers import Tokenizer

Columns = Mapping[str, Any]

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


def row_encoder(cfg: SourceConfig, tokenizer: Tokenizer) -> Callable[[Columns], Encoded]:
    """The function that turns one row into tokens.

    Raises:
        ValueError: settings that do not fit the format, or a tokenizer that lacks what the format needs. The function
            itself raises ValueError for a row of the wrong shape.
    """
    known = _COLUMNS[cfg.format]
    template = None if cfg.prompt_template is None else _parse_template(cfg.prompt_template)
    if template is not None and cfg.format != "instruct":
        raise ValueError(f"prompt_template is for format=instruct, not {cfg.format}. Leave it out.")
    if template is not None:
        known = (*(name for _, name in template if name is not None), "output")
    unknown = sorted(set(cfg.column_map) - set(known))
    if unknown:
        raise ValueError(
            f"column_map has {unknown[0]!r}, which the format {cfg.format} does not read. It maps the names of the "
            f"format, or of prompt_template, to the columns of the rows; the names are {', '.join(known)}."
        )
    if cfg.train_on_input and cfg.format in ("text", "tokens"):
        raise ValueError(
            f"train_on_input=true says nothing for format={cfg.format}, whose rows have no prompt. Leave it out."
        )

    if cfg.format != "chat" and (cfg.chat_template is not None or cfg.train_on_last_turn):
        setting = "train_on_last_turn" if cfg.train_on_last_turn else "chat_template"
        raise ValueError(f"{setting} is for format=chat, not {cfg.format}. Leave it out.")
    if cfg.train_on_input and cfg.train_on_last_turn:
        raise ValueError(
            "train_on_input=true labels every turn, train_on_last_turn=true the assistant's last one only. Give one."
        )

    if cfg.format == "chat":
        chat_tokenizer = with_template(tokenizer, cfg)
        check_stop(chat_tokenizer)  # raises if there is no template
        return lambda row: _encode_chat(row, cfg, chat_tokenizer)
    if cfg.format == "tokens":
        return lambda row: token_files.encode(row, cfg.column_map)
    eos_id = tokenizer.eos_id  # raises if there is none
    if cfg.format == "text":
        return lambda row: _encode_text(row, cfg, tokenizer, eos_id)
    if cfg.format == "completion":
        return lambda row: _encode_pair(
            _text(row, "prompt", cfg), _text(row, "completion", cfg), cfg.train_on_input, tokenizer, eos_id
        )
    return lambda row: _encode_pair(
        _alpaca(row, cfg) if template is None else _fill(template, row, cfg),
        _text(row, "output", cfg),
        cfg.train_on_input,
        tokenizer,
        eos_id,
    )


def _encode_pair(prompt: str, answer: str, train_on_input: bool, tokenizer: Tokenizer, eos_id: int) -> Encoded:
    if not answer.strip():
        return []
    # The prompt is encoded by itself, as it will be when the model is asked: no token reaches into the answer.
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = [*tokenizer.encode(answer, continues=bool(prompt)), eos_id]
    return [(prompt_ids + answer_ids, [train_on_input] * len(prompt_ids) + [True] * len(answer_ids))]


def _encode_text(row: Columns, cfg: SourceConfig, tokenizer: Tokenizer, eos_id: int) -> Encoded:
    text = _text(row, "text", cfg)
    if not text:
        return []
    ids = [*tokenizer.encode(text), eos_id]
    return [(ids, [True] * len(ids))]


def _encode_chat(row: Columns, cfg: SourceConfig, tokenizer: Tokenizer) -> Encoded:
    column = cfg.column_map.get("messages")
    if column is None:
        column = "messages" if "messages" in row or "conversations" not in row else "conversations"
    messages = read_messages(_value(row, column, "messages"), column)
    tools_column = cfg.column_map.get("tools", "tools")
    if "tools" in cfg.column_map and tools_column not in row:
        _value(row, tools_column, "tools")  # raises; rows may go without tools, not under a name that was given
    tools = row.get(tools_column)
    labelled: Labelled = "all" if cfg.train_on_input else "last" if cfg.train_on_last_turn else "answers"
    return encode_turns(split_turns(messages, tools, tokenizer, labelled), tokenizer)


def _alpaca(row: Columns, cfg: SourceConfig) -> str:
    instruction = _text(row, "instruction", cfg)
    is_given = row.get(cfg.column_map.get("input", "input")) is not None  # parquet and csv have the column in each row
    context = _text(row, "input", cfg) if is_given else ""
    template = ALPACA_WITH_INPUT if context else ALPACA
    return template.format(instruction=instruction, input=context)


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """A template as pieces of text, each with the name of the column behind it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"prompt_template: {error}. Columns stand in braces; a brace itself is written twice."
        ) from None
    for _, name, spec, conversion in parts:
        # A column's name and nothing else: format()'s attributes and indices would reach into Python objects.
        if name is not None and (not name or spec or conversion or set(name) & set(".[]")):
            raise ValueError(
                f"prompt_template: {{{name}}} is not the name of a column. A brace itself is written twice."
            )
    return [(text, name) for text, name, _, _ in parts]


def _fill(template: list[tuple[str, str | None]], row: Columns, cfg: SourceConfig) -> str:
    return "".join(text + ("" if name is None else _text(row, name, cfg)) for text, name in template)


def _text(row: Columns, name: str, cfg: SourceConfig) -> str:
    return _string(row, cfg.column_map.get(name, name), name)


def _string(row: Columns, column: str, name: str) -> str:
    value = _value(row, column, name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"column {column!r} is a {type(value).__name__}, expected text.")
    return value


def _looks_like(row: Columns) -> str:
    """The format that has these columns, if there is one."""
    return next((f" They look like format={name}." for name, needed in _NEEDED if set(needed) <= row.keys()), "")


def _value(row: Columns, column: str, name: str) -> Any:
    if column not in row:
        raise BadRow(
            "missing column",
            f"no column {column!r}; there are: {', '.join(map(str, row)) or '(none)'}.{_looks_like(row)} If another "
            f"one is meant, say so: column_map={{{name}: <column>}}.",
        )
    if row[column] is None:
        raise BadRow("null", f"column {column!r} is null, expected a value.")
    return row[column]
