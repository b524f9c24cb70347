"""Conversations: the two forms that they come in, and which tokens of the rendered text the assistant said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal, NamedTuple

from kdtune.data.config import DatasetConfig, SourceConfig
from kdtune.data.rows import BadRow
from kdtune.tokenizers import ChatTemplate, Rendered, Tokenizer

# ShareGPT's names, and the OpenAI ones that they stand for.
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# Names of the thoughts before an answer. transformers gives them to a template under the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# What a template that writes today's date (Llama 3.2, SmolLM3) is told. With the real one, the same rows would be other
# examples every day: a run could not be repeated, nor resumed after midnight. Llama 3's templates know this day, too.
DATE = datetime(2024, 7, 26)

Message = dict[str, Any]
Piece = tuple[str, bool]  # text, and whether the assistant said it
Encoded = list[tuple[list[int], list[bool]]]  # examples of one row: tokens, and whether each is to be predicted
Labelled = Literal["answers", "last", "all"]  # the assistant's turns, its last one, or everything


class Turns(NamedTuple):
    """A row of messages as text."""

    conversations: list[list[Piece]]  # the pieces' concatenation is the rendered text; none if nobody answers
    is_marked: bool  # the template itself marks what the assistant says, to the character


def read_messages(value: Any, column: str) -> list[Message]:
    """OpenAI's (role, content) or ShareGPT's (from, value) messages as the former.

    Raises:
        BadRow: not a list of messages, an unknown role, or a message without content.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow("wrong type", f"column {column!r} is a {type(value).__name__}, expected a list of messages.")
    if not value:
        raise BadRow("no messages", f"column {column!r} is an empty list, expected messages.")
    return [_read_message(message, f"message {i} in {column!r}") for i, message in enumerate(value, start=1)]


def _read_message(message: Any, what: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow("wrong type", f"{what} is a {type(message).__name__}, expected an object with role and content.")
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    if role_key not in message:
        raise BadRow(
            "no role",
            f"{what} has the keys {', '.join(message) or '(none)'}, expected role and content (OpenAI) or from and "
            "value (ShareGPT).",
        )
    name = message[role_key]
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow("unknown role", f"{what} has the unknown role {name!r}; known are {', '.join(_ROLES)}.")
    # Columns of parquet files exist in every message, null where a message has none.
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    content = message.get(content_key)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BadRow("content is not text", f"{what} has content that is not text. Models here read text only.")
        content = "".join(part["text"] for part in content)
    reasoning = next((rest[name] for name in _REASONING if name in rest), None)
    if reasoning is not None:
        rest = {"thinking": reasoning, **rest, "reasoning_content": reasoning}
    if "tool_calls" in rest:
        rest["tool_calls"] = _read_calls(rest["tool_calls"], what)
    if content is None and role == "assistant" and rest.get("tool_calls"):
        return {"role": role, **rest}  # a template would write a content of null as None
    if content is None:
        raise BadRow("no content", f"{what} has no content.")
    if not isinstance(content, str):
        raise BadRow("content is not text", f"{what} has content of type {type(content).__name__}.")
    return {"role": role, "content": content, **rest}


def _read_calls(calls: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow("tools", f"{what} has tool_calls that are not a list of objects.")
    return [
        {**call, "function": _read_function(call["function"])} if isinstance(call.get("function"), dict) else call
        for call in map(_read_function, calls)
    ]


def _read_function(function: dict[str, Any]) -> dict[str, Any]:
    # OpenAI's arguments are json in a string; templates want the object, and would write a string of a string.
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return function
        if isinstance(parsed, dict):
            return {**function, "arguments": parsed}
    return function


def split_turns(messages: Sequence[Message], tools: Any, tokenizer: Tokenizer, labelled: Labelled = "answers") -> Turns:
    """The rendered conversation, cut where the assistant's turns begin and end.

    Where the template marks what the model says ({% generation %}), the marks are the cuts, and one rendering is
    enough. Else the cuts come from what it writes for parts of the conversation: the text of the messages before a
    turn, with the header that invites an answer, is the prompt of that turn; the text of the messages up to the turn
    ends with it.

    A template may rewrite earlier turns (Qwen 3 drops their reasoning). Then no single text holds all turns as they
    would be generated, and each turn becomes a conversation of its own, with only its last turn as the assistant's.

    Args:
        messages: from `read_messages`.
        tools: json schemas of functions, as a list or as json; None: none.
        tokenizer: with a chat template.
        labelled: what counts as the assistant's: its turns, its last one, or everything.

    Raises:
        BadRow: the template refuses the conversation.
    """
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [i for i in said if _says_something(messages[i])]
    if not answers:
        return Turns([], False)
    render = partial(_render, tokenizer, _read_tools(tools))
    whole, marked = render(messages)
    if labelled == "all":
        return Turns([[(whole, True)]], True)
    wanted = answers[-1:] if labelled == "last" else answers
    if marked is None:
        return Turns(_split_by_rendering(messages, wanted, whole, render), False)
    if len(marked) == len(said):
        kept = [span for i, span in zip(said, marked, strict=True) if i in wanted]
    elif labelled == "last":  # several marks in a turn, or none in some
        kept = marked[len(render(messages[: answers[-1]]).answers or []) :]
    else:
        kept = marked
    return Turns([_cut(whole, kept)], True)


def encode_turns(turns: Turns, tokenizer: Tokenizer) -> Encoded:
    """Tokens, and whether the assistant said each of them, with the token that ends its turn and nothing behind it."""
    encoded: Encoded = []
    for parts in turns.conversations:
        tokens: list[int] = []
        is_label: list[bool] = []
        answers = [is_answer for _, is_answer in parts]
        for ids, is_answer in zip(tokenizer.encode_parts([text for text, _ in parts], answers), answers, strict=True):
            # The template's own marks are exact; a text up to the end of a turn may have more in it.
            said = (len(ids) if turns.is_marked else _length_to_stop(ids, tokenizer)) if is_answer else 0
            tokens += ids
            is_label += [True] * said + [False] * (len(ids) - said)
        encoded.append((tokens, is_label))
    return encoded


def with_template(tokenizer: Tokenizer, cfg: SourceConfig, section: str) -> Tokenizer:
    """The tokenizer with the chat template that the settings name, or as it is.

    Raises:
        ValueError: there is no such template, or it does not fit the tokenizer.
    """
    if cfg.chat_template is None:
        return tokenizer
    try:
        return tokenizer.with_chat_template(cfg.chat_template)
    except ValueError as error:
        raise ValueError(f"{section}.chat_template: {error}") from None


def check_stop(tokenizer: Tokenizer) -> int | None:
    """The special token that ends an answer in the tokenizer's chat template; None, and a warning, if there is none.

    Raises:
        ValueError: there is no chat template, or it is not valid.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        turns = split_turns(probe, None, tokenizer)
    except ValueError:
        if tokenizer.has_chat_template:
            return None  # it has a taste for other conversations
        raise
    ((ids, is_label),) = encode_turns(turns, tokenizer)
    said = [id for id, is_said in zip(ids, is_label, strict=True) if is_said]
    if said and said[-1] in tokenizer.special_ids:
        return said[-1]
    warnings.warn(
        "the chat template has no special token at the end of what the assistant says, so a model cannot learn from "
        f"these rows where to stop. An answer ends in {tokenizer.decode(said[-3:])!r}.",
        stacklevel=1,  # one place: said once
    )
    return None


def trained_template(
    tokenizer: Tokenizer, dataset: DatasetConfig, dataset_val: DatasetConfig | None = None
) -> ChatTemplate | None:
    """What the folder of the finished model has to carry, so that it is asked as it was trained; None: what it has.

    Raises:
        ValueError: data sets name different templates.
    """
    sections: dict[str, SourceConfig] = {}
    for name, cfg in (("dataset", dataset), ("dataset_val", dataset_val)):
        if cfg is not None:
            sources: dict[str, SourceConfig] = {
                f"{name}.sources.{label}": source for label, source in cfg.sources.items()
            }
            sections.update(sources or {name: cfg})
    chats = {name: source for name, source in sections.items() if source.format == "chat"}
    if len({source.chat_template for source in chats.values()}) > 1:
        found = ", ".join(f"{name}.chat_template={source.chat_template or 'null'}" for name, source in chats.items())
        raise ValueError(f"{found}: but a model has one template. Name the same in each.")
    for name, source in chats.items():
        if source.chat_template is not None:
            tokenizer = with_template(tokenizer, source, name)
            return ChatTemplate(tokenizer.chat_templates["default"], check_stop(tokenizer))
    return None


def _length_to_stop(ids: list[int], tokenizer: Tokenizer) -> int:
    # Generation stops at the end-of-turn token; what a template writes after it is not the model's: a line break, or
    # another special token (Phi-3 ends a whole conversation with <|endoftext|>).
    end = stop = None
    for i in reversed(range(len(ids))):
        if ids[i] in tokenizer.special_ids:
            end = i if end is None else end
            stop = i if ids[i] in tokenizer.eos_ids else stop
        elif tokenizer.decode([ids[i]]).strip():
            break
    found = end if stop is None else stop
    return len(ids) if found is None else found + 1


def _render(
    tokenizer: Tokenizer, tools: list[dict[str, Any]] | None, messages: Sequence[Message], **settings: Any
) -> Rendered:
    try:
        return tokenizer.render_answers(messages, tools=tools, date=DATE, **settings)
    except ValueError as error:
        raise BadRow("template", str(error)) from None


def _split_by_rendering(
    messages: Sequence[Message], answers: Sequence[int], whole: str, render: Callable[..., Rendered]
) -> list[list[Piece]]:
    turns = []  # start of the answer, and the text up to its end
    for i in answers:
        try:
            text = whole if i == len(messages) - 1 else render(messages[: i + 1]).text
            prompt = render(messages[:i], add_generation_prompt=True).text
        except ValueError as error:
            raise BadRow("template", f"up to message {i + 1}, which is the assistant's, {error}") from None
        turns.append((_shared_length(prompt, text), text))
    if all(whole.startswith(text) for _, text in turns):
        return [_cut(whole, [(start, len(text)) for start, text in turns])]
    return [[(text[:start], False), (text[start:], True)] for start, text in turns]


def _cut(text: str, answers: Sequence[tuple[int, int]]) -> list[Piece]:
    parts: list[Piece] = []
    position = 0
    for start, end in answers:
        parts += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [*parts, (text[position:], False)]


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRow("tools", f"the tools are not valid json: {error}.") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("tools", f"the tools are a {type(tools).__name__}, expected a list of objects (json schemas).")
    return tools or None


def _shared_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _says_something(message: Message) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))
