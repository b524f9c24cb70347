"""Chat templates: messages to text, with the environment that the templates of Hugging Face folders are written for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The templates in the folder beside this file, and the tokens without which each of them is only text.
NAMED: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    "mistral_v1": (),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
_FOLDER = Path(__file__).parent / "templates"
_TRACKER = "_kdtune_tracker"


class ChatTemplate(NamedTuple):
    """A template for a checkpoint's folder."""

    source: str
    stop_id: int | None  # the token that ends an answer


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str
    answers: list[tuple[int, int]] | None  # what {% generation %} encloses, in characters; None: no such markers


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, date: datetime | None = None, **variables: Any
) -> Rendered:
    """Renders `messages` with a jinja template, sandboxed: a template comes with a checkpoint and cannot be trusted.

    Args:
        template: the jinja source.
        messages: dicts with `role` and `content`.
        date: what a template that asks for the time is told. None: now.
        variables: further names that the template may use.

    Raises:
        ValueError: the template is broken, or refuses these messages (in its own words).
    """
    variables |= {"messages": messages, "strftime_now": (date or datetime.now()).strftime}
    try:
        compiled, has_markers = _compile(template)
        if not has_markers:
            return Rendered(compiled.render(variables), None)
        tracker = _Tracker()
        for piece in compiled.generate(variables, **{_TRACKER: tracker}):
            tracker.add(piece)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error.message}") from None
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"the chat template cannot render this conversation: {error}") from None
    text = "".join(tracker.pieces)
    # What a macro or a set block holds back is written later than its markers were met: then their place is unknown.
    is_placed = all(text.startswith(body, start) for start, body in tracker.marked)
    return Rendered(text, [(start, start + len(body)) for start, body in tracker.marked] if is_placed else None)


def read(name: str) -> str:
    """The source of a template: one of NAMED, or a .jinja file.

    Raises:
        ValueError: no such name or file.
    """
    path = _FOLDER / f"{name}.jinja" if name in NAMED else Path(name)
    if not path.is_file():
        raise ValueError(f"the chat template {name} is neither a file nor one of {', '.join(NAMED)}.")
    return path.read_text(encoding="utf-8")


@lru_cache(maxsize=16)
def names(template: str) -> frozenset[str]:
    """What a template reads: variables, and attributes or items of anything.

    Raises:
        ValueError: not valid jinja.
    """
    tree = _parse(template)
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(jinja2.meta.find_undeclared_variables(tree) | attributes | constants)


def literal_tokens(template: str) -> list[str]:
    """What looks like a special token in the text that a template itself writes."""
    tree = _parse(template)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    found = [token for text in texts for token in re.findall(r"<\|[^\s<>|]+\|>|<(?:start|end)_of_\w+>", text)]
    return list(dict.fromkeys(found))


class _Tracker:
    """What was written so far, and the bodies of generation markers with the places where they begin."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.marked: list[tuple[int, str]] = []

    def add(self, piece: str) -> None:
        self.pieces.append(piece)
        self.length += len(piece)


class _Generation(Extension):
    """`{% generation %}` marks what the model says; its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, context: Context, caller: Macro) -> str:
        body = str(caller())
        tracker = context.get(_TRACKER)
        if tracker is not None:
            tracker.marked.append((tracker.length, body))
        return body


@lru_cache(maxsize=16)
def _compile(template: str) -> tuple[jinja2.Template, bool]:
    environment = _environment()
    markers = environment.parse(template).find_all(nodes.ExtensionAttribute)
    return environment.from_string(template), any(node.name == "mark" for node in markers)


def _parse(template: str) -> nodes.Template:
    try:
        return _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}") from None


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own filter escapes <, > and & for html.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
