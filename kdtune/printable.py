"""Text that comes from elsewhere, made harmless to whoever reads it."""

TEXT = "\n\t\u200c\u200d"  # what belongs into a text of several lines; the joiners are how some scripts are written


def visible(text: str, keep: str = "") -> str:
    """Text with all that does not print, or that a terminal would obey, as an escape.

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
