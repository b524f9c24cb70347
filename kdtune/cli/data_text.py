"""`kdtune data` as text, for a terminal or a pipe."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from kdtune.cli import terminal

if TYPE_CHECKING:
    from kdtune.cli.data import View
    from kdtune.data.view import Bin, Document, Row, Token

_MARKS = "⟦⟧⟪⟫↵"
_ASCII_MARKS = ("[[", "]]", "{{", "}}", "\\n")
_WIDTH = 80
# Neighbouring tokens differ, so that it shows where one ends: green and cyan with a label, dim and normal without.
_WITH_LABEL, _WITHOUT_LABEL, _SPECIAL, _RESET = ("1;32", "1;36"), ("2", "22"), "7", "\x1b[0m"


def write(view: "View", stream: TextIO) -> None:
    """Rows first and numbers last, where they stay in sight."""
    colour = terminal.has_colour(stream)
    marks = tuple(_MARKS) if terminal.fits(_MARKS, stream) else _ASCII_MARKS
    for line in lines(view, marks, colour):
        print(line if terminal.fits(line, stream) else _encodable(line, stream), file=stream)


def lines(view: "View", marks: tuple[str, ...], colour: bool) -> Iterator[str]:
    """The whole of it."""
    yield terminal.visible(view.title)
    if view.rows:
        yield _legend(marks, colour)
    for row in view.rows:
        yield ""
        yield from _row(row, marks, colour)
    yield ""
    for name, value in view.facts:
        yield f"{name:<17}{terminal.visible(value)}"
    yield ""
    if view.sources:
        yield from _table(view.sources)
        yield ""
    yield view.lengths
    yield from _histogram(view.bins)
    yield f"-- {view.limit} ".ljust(_width(), "-")


def _legend(marks: tuple[str, ...], colour: bool) -> str:
    opening, closing, special, end_special, newline = marks
    if colour:
        return f"{_paint('with a', 0, True)}{_paint(' label', 1, True)}, {_paint('special', 0, True, True)}"
    return f"{opening}with a label{closing}, {special}special token{end_special}, {newline} line break"


def _row(row: "Row", marks: tuple[str, ...], colour: bool) -> Iterator[str]:
    place = f"row {row.number:,} ({row.place})"
    if len(row.documents) > 1:
        yield f"{place}: {len(row.documents):,} documents, {sum(one.length for one in row.documents):,} tokens"
    for number, document in enumerate(row.documents, start=1):
        head = place if len(row.documents) == 1 else f"-- document {number:,}"
        yield f"{head}: {about(document)}"
        spell = _coloured if colour else _marked
        # Indented, so that no text of a row can pass for a line of ours.
        yield from (f"  {line}" for line in spell(document.tokens, marks).split("\n"))


def about(document: "Document") -> str:
    """One line: how long, how many labels, where from."""
    origin = f", from {document.origin}" if document.origin else ""
    return f"{document.length:,} tokens, {document.num_labels:,} with a label{origin}"


def _marked(tokens: "list[Token]", marks: tuple[str, ...]) -> str:
    opening, closing, special, end_special, _ = marks
    parts, is_open = [], False
    for token in tokens:
        if token.is_label != is_open:
            parts.append(opening if token.is_label else closing)
            is_open = token.is_label
        # What stands for a mark is not left to look like one.
        text = "".join(f"\\u{ord(char):04x}" if char in _MARKS else char for char in token.text)
        text = _visible(text, marks)
        parts.append(f"{special}{text}{end_special}" if token.is_special else text)
    return "".join(parts) + (closing if is_open else "")


def _coloured(tokens: "list[Token]", marks: tuple[str, ...]) -> str:
    return "".join(
        _paint(_visible(token.text, marks), i, token.is_label, token.is_special) for i, token in enumerate(tokens)
    )


def _paint(text: str, number: int, is_label: bool, is_special: bool = False) -> str:
    """Colour that ends before each line break: a background would run on to the edge of the terminal."""
    code = (_WITH_LABEL if is_label else _WITHOUT_LABEL)[number % 2] + (f";{_SPECIAL}" if is_special else "")
    return "\n".join(f"\x1b[{code}m{line}{_RESET}" if line else "" for line in text.split("\n"))


def _visible(text: str, marks: tuple[str, ...]) -> str:
    return terminal.visible(text, keep="\n").replace("\n", f"{marks[4]}\n")


def _table(table: list[list[str]]) -> Iterator[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield terminal.visible("  ".join([f"{name:<{widths[0]}}", *numbers]))


def _histogram(bins: "list[Bin]") -> Iterator[str]:
    names = [f"{one.first:,} - {one.last:,}" for one in bins]
    name_width, count_width = max(map(len, names)), max(len(f"{one.count:,}") for one in bins)
    room = _width() - name_width - count_width - 4
    highest = max(one.count for one in bins)
    for name, one in zip(names, bins, strict=True):
        bar = "#" * max(round(room * one.count / highest), one.count > 0)
        yield f"{name:>{name_width}}  {one.count:>{count_width},}  {bar}".rstrip()


def _width() -> int:
    return max(40, min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns))


def _encodable(line: str, stream: TextIO) -> str:
    encoding = stream.encoding or "ascii"
    return line.encode(encoding, "backslashreplace").decode(encoding)
