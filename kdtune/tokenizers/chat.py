"""Chat templates: messages to text, with the environment that the templates of Hugging Face folders are written for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, date: datetime | None = None, **variables: Any
) -> str:
    """Renders `messages` with a jinja template, sandboxed: a template comes with a checkpoint and cannot be trusted.

    Args:
        template: the jinja source.
        messages: dicts with `role` and `content`.
        date: what a template that asks for the time is told. None: now.
        variables: further names that the template may use.

    Raises:
        ValueError: the template is broken, or refuses these messages (in its own words).
    """
    strftime_now = (date or datetime.now()).strftime
    try:
        return _compile(template).render(messages=messages, strftime_now=strftime_now, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error.message}") from None
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"the chat template cannot render this conversation: {error}") from None


class _Generation(Extension):
    """`{% generation %}` marks what the model says; for rendering, its body is all there is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own filter escapes <, > and & for html.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
