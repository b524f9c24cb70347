"""What may be written to a terminal."""

import os
from typing import TextIO


def visible(text: str, keep: str = "") -> str:
    """Text that comes from elsewhere, with all that does not print, or that a terminal would obey, as an escape.

    Control characters and escape sequences, marks that turn the direction of writing, characters without width.

    Args:
        text: anything.
        keep: characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def has_colour(stream: TextIO) -> bool:
    """Whether to colour: on a terminal, unless NO_COLOR (https://no-color.org) or a dumb terminal forbids it."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def fits(text: str, stream: TextIO) -> bool:
    """Whether the stream's encoding has these characters."""
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
