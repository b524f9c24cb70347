"""Conversations: the two forms that they come in, and which part of the rendered text the assistant said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

from kdtune.tokenizers import Tokenizer

# ShareGPT's names, and the OpenAI ones that they stand for.
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
}

# What a template that writes today's date (Llama 3.2, SmolLM3) is told. With the real one, the same rows would be other
# examples every day: a run could not be repeated, nor resumed after midnight. Llama 3's templates know this day, too.
DATE = datetime(2024, 7, 26)

Message = dict[str, Any]
Part = tuple[str, bool]  # text, and whether the assistant said it


def read_messages(value: Any, column: str) -> list[Message]:
    """OpenAI's (role, content) or ShareGPT's (from, value) messages as the former.

    Raises:
        ValueError: not a list of messages, an unknown role, or a message without content.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"column {column!r} is a {type(value).__name__}, expected a list of messages.")
    if not value:
        raise ValueError(f"column {column!r} is an empty list, expected messages.")
    return [_read_message(message, f"message {i} in {column!r}") for i, message in enumerate(value, start=1)]


def _read_message(message: Any, what: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{what} is a {type(message).__name__}, expected an object with role and content.")
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    if role_key not in message:
        raise ValueError(
            f"{what} has the keys {', '.join(message) or '(none)'}, expected role and content (OpenAI) or from and "
            "value (ShareGPT)."
        )
    role = _ROLES.get(message[role_key])
    if role is None:
        raise ValueError(f"{what} has the unknown role {message[role_key]!r}; known are {', '.join(_ROLES)}.")
    # Columns of parquet files exist in every message, null where a message has none.
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    content = message.get(content_key)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"{what} has content that is not text. Models here read text only.")
        content = "".join(part["text"] for part in content)
    if content is None and role == "assistant" and rest.get("tool_calls"):
        return {"role": role, "content": None, **rest}
    if not isinstance(content, str):
        raise ValueError(
            f"{what} has {'no content' if content is None else f'content of type {type(content).__name__}'}."
        )
    return {"role": role, "content": content, **rest}


def split_turns(messages: Sequence[Message], tools: Any, tokenizer: Tokenizer) -> list[list[Part]]:
    """The rendered conversation, cut where the assistant's turns begin and end.

    The cuts come from the template itself: what it writes for the messages before a turn, with the header that invites
    an answer, is the prompt of that turn; what it writes for the messages up to the turn ends with it.

    A template may rewrite earlier turns (Qwen 3 drops their reasoning). Then no single text holds all turns as they
    would be generated, and each turn becomes a conversation of its own, with only its last turn as the assistant's.

    Returns:
        Conversations, each as parts whose concatenation is the rendered text. None if the assistant says nothing.

    Raises:
        ValueError: the template refuses the conversation.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"the tools are not valid json: {error}.") from None
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and _says_something(message)]
    render = partial(tokenizer.render_chat, tools=tools or None, date=DATE)
    turns = []  # start of the answer, and the text up to its end
    for i in answers:
        text = render(messages[: i + 1])
        prompt = render(messages[:i], add_generation_prompt=True)
        turns.append((_shared_length(prompt, text), text))
    if not turns:
        return []
    whole = render(messages)
    if not all(whole.startswith(text) for _, text in turns):
        return [[(text[:start], False), (text[start:], True)] for start, text in turns]
    parts: list[Part] = []
    position = 0
    for start, text in turns:
        parts += [(whole[position:start], False), (whole[start : len(text)], True)]
        position = len(text)
    return [[*parts, (whole[position:], False)]]


def _shared_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _says_something(message: Message) -> bool:
    return bool(message["content"] or message.get("tool_calls"))
