"""`kdtune data` as one HTML page that loads nothing. Whatever comes out of the rows is escaped."""

from typing import TYPE_CHECKING

from kdtune.cli import data_text
from kdtune.reporting.markup import escape, page, table

if TYPE_CHECKING:
    from kdtune.cli.data import View
    from kdtune.data.view import Bin, Document, Row, Token

_STYLE = """
:root { --label: #c9efd2; --label-edge: #23803c; }
@media screen and (prefers-color-scheme: dark) { :root { --label: #1a4a29; --label-edge: #54c173; } }
.histogram, .histogram td:last-child { width: 100%; }
.bar { display: block; height: 0.9rem; background: var(--bar); }
.limit { border-top: 2px dashed var(--ink); padding-top: 0.2rem; margin: 0; }
pre + .about { border-top: 1px dashed var(--faint); padding-top: 0.3rem; }
.token { color: var(--faint); border-left: 1px solid var(--line); }
.label { color: var(--ink); background: var(--label); border-bottom: 2px solid var(--label-edge);
  border-left-color: var(--label-edge); }
.special { font-weight: bold; border-radius: 0.3rem; outline: 1px solid var(--faint); outline-offset: -1px;
  padding: 0 0.2em; }
.token:hover { outline: 2px solid var(--ink); }
@media print { .bar, .label { print-color-adjust: exact; } }
"""


def render(view: "View") -> str:
    """The page."""
    title = escape(view.title)
    facts = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in view.facts)
    warnings = "".join(f'<p class="warning">{escape(message)}</p>\n' for message in view.warnings)
    rows = "\n".join(map(_row, view.rows))
    body = f"""<h1>{title}</h1>
{warnings}<dl>
{facts}
</dl>
{_sources(view.sources)}<h2>Lengths</h2>
<p class="about">{escape(view.lengths)}</p>
<table class="histogram">
{_histogram(view.bins)}
</table>
<p class="limit">{escape(view.limit)}</p>
<h2>Rows</h2>
<p class="about"><span class="token label">with a label</span> <span class="token">without</span>
<span class="token special">special token</span> The id of a token shows when you point at it.</p>
{rows}
"""
    return page(view.title, body, style=_STYLE)


def _sources(rows: list[list[str]]) -> str:
    return f"<h2>Sources</h2>\n{table(rows[0], rows[1:])}" if rows else ""


def _histogram(bins: "list[Bin]") -> str:
    highest = max(one.count for one in bins)
    return "\n".join(
        f'<tr><th scope="row">{one.first:,} - {one.last:,}</th><td>{one.count:,}</td>'
        f'<td><span class="bar" style="width: {100 * one.count / highest:.1f}%"></span></td></tr>'
        for one in bins
    )


def _row(row: "Row") -> str:
    head = f"Row {row.number:,} <small>{escape(row.place)}</small>"
    return (
        f"<article>\n<h3>{head}</h3>\n"
        + "\n".join(
            _document(document, number if len(row.documents) > 1 else None)
            for number, document in enumerate(row.documents, start=1)
        )
        + "\n</article>"
    )


def _document(document: "Document", number: int | None) -> str:
    name = "" if number is None else f"document {number:,}: "
    tokens = "".join(map(_token, document.tokens))
    return f'<p class="about">{name}{escape(data_text.about(document))}</p>\n<pre>{tokens}</pre>'


def _token(token: "Token") -> str:
    names = ["token"] + ["label"] * token.is_label + ["special"] * token.is_special
    ids = ", ".join(map(str, token.ids))
    tip = f"id {ids}" + (", label" if token.is_label else "")
    text = escape(token.text, keep="\n").replace("\n", "↵\n")
    return f'<span class="{" ".join(names)}" title="{tip}">{text}</span>'
