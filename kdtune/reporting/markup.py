"""HTML of which all that comes from elsewhere is escaped, in pages that load nothing."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from kdtune.printable import visible


class Markup(str):
    """Text that is HTML already."""


def escape(text: object, keep: str = "") -> Markup:
    """What is not markup as text that shows as it is, with all that does not print as an escape; markup unchanged.

    Args:
        text: anything.
        keep: characters that do not print and yet stay, such as a line break.
    """
    return text if isinstance(text, Markup) else Markup(html.escape(visible(str(text), keep)))


def element(tag: str, *inner: object, **attributes: object) -> Markup:
    """`<tag attributes>inner</tag>`; of an attribute `class_` is class, and `data_x` is data-x."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>{''.join(map(escape, inner))}</{tag}>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], class_: str | None = None) -> Markup:
    """A table that scrolls where it is wider than the page; the first cell of a row is its heading."""
    cells = Markup("".join(element("th", name, scope="col") for name in head))
    body = "\n".join(
        element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in line)) for name, *line in rows
    )
    inner = Markup(f"\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody>\n")
    return Markup(f'<div class="wide">{element("table", inner, class_=class_)}</div>\n')


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A document that loads nothing and runs no script but the one given.

    Args:
        title: any text.
        body: markup.
        style: CSS, after that of all pages.
        script: JavaScript of ours, which must not hold anything that comes from elsewhere.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if script:
        # By its hash, so that no other script would run even if one got into the page.
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        script = f"<script>{script}</script>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{_file("page.css")}{style}</style>
</head>
<body>
{body}{script}</body>
</html>
"""


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
