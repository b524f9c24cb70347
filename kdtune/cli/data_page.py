"""`kdtune data` as one HTML page that loads nothing. Whatever comes out of the rows is escaped."""

import html
from typing import TYPE_CHECKING

from kdtune.cli import data_text, terminal

if TYPE_CHECKING:
    from kdtune.cli.data import View
    from kdtune.data.view import Bin, Document, Row, Token

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --faint: #666; --line: #ddd; --label: #c9efd2;
  --label-edge: #23803c; --bar: #4a7fb5; --alarm: #fff0c8; --alarm-edge: #c98a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #161618; --faint: #9a9a9a; --line: #3a3a3e;
  --label: #1a4a29; --label-edge: #54c173; --bar: #6f9fd0; --alarm: #45360b; --alarm-edge: #e0ac35; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 0.9rem; margin: 1.5rem 0 0.3rem; }
h3 small { font-weight: normal; color: var(--faint); }
.about { color: var(--faint); font-size: 0.85rem; margin: 0.3rem 0; }
.warning { background: var(--alarm); border-left: 0.3rem solid var(--alarm-edge); padding: 0.4rem 0.8rem;
  overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 1rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.1rem 0; text-align: right; white-space: nowrap; font-weight: normal; }
th + *, td + * { padding-left: 1rem; }
.wide th:first-child { text-align: left; }
thead th { color: var(--faint); }
.histogram, .histogram td:last-child { width: 100%; }
.bar { display: block; height: 0.9rem; background: var(--bar); }
.limit { border-top: 2px dashed var(--ink); padding-top: 0.2rem; margin: 0; }
pre { margin: 0; padding: 0.6rem; border: 1px solid var(--line); border-radius: 0.4rem; font-size: 0.85rem;
  line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere; }
pre + .about { border-top: 1px dashed var(--faint); padding-top: 0.3rem; }
.token { color: var(--faint); border-left: 1px solid var(--line); }
.label { color: var(--ink); background: var(--label); border-bottom: 2px solid var(--label-edge);
  border-left-color: var(--label-edge); }
.special { font-weight: bold; border-radius: 0.3rem; outline: 1px solid var(--faint); outline-offset: -1px;
  padding: 0 0.2em; }
.token:hover { outline: 2px solid var(--ink); }
@media (max-width: 30rem) { dl { display: block; } dd { margin-bottom: 0.5rem; } }
@media print { body { max-width: none; padding: 0; font-size: 0.8rem; } h2, h3, .about { break-after: avoid; }
  .bar, .label, .warning { print-color-adjust: exact; } tr, .warning { break-inside: avoid; } }
"""


def render(view: "View") -> str:
    """The page."""
    title = _escape(view.title)
    facts = "\n".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in view.facts)
    warnings = "".join(f'<p class="warning">{_escape(message)}</p>\n' for message in view.warnings)
    rows = "\n".join(map(_row, view.rows))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{warnings}<dl>
{facts}
</dl>
{_sources(view.sources)}<h2>Lengths</h2>
<p class="about">{_escape(view.lengths)}</p>
<table class="histogram">
{_histogram(view.bins)}
</table>
<p class="limit">{_escape(view.limit)}</p>
<h2>Rows</h2>
<p class="about"><span class="token label">with a label</span> <span class="token">without</span>
<span class="token special">special token</span> The id of a token shows when you point at it.</p>
{rows}
</body>
</html>
"""


def _sources(table: list[list[str]]) -> str:
    if not table:
        return ""
    head, *lines = table
    cells = "".join(f'<th scope="col">{_escape(name)}</th>' for name in head)
    body = "\n".join(
        f'<tr><th scope="row">{_escape(name)}</th>' + "".join(f"<td>{_escape(cell)}</td>" for cell in line) + "</tr>"
        for name, *line in lines
    )
    return f"""<h2>Sources</h2>
<div class="wide"><table>
<thead><tr>{cells}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
"""


def _histogram(bins: "list[Bin]") -> str:
    highest = max(one.count for one in bins)
    return "\n".join(
        f'<tr><th scope="row">{one.first:,} - {one.last:,}</th><td>{one.count:,}</td>'
        f'<td><span class="bar" style="width: {100 * one.count / highest:.1f}%"></span></td></tr>'
        for one in bins
    )


def _row(row: "Row") -> str:
    head = f"Row {row.number:,} <small>{_escape(row.place)}</small>"
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
    return f'<p class="about">{name}{_escape(data_text.about(document))}</p>\n<pre>{tokens}</pre>'


def _token(token: "Token") -> str:
    names = ["token"] + ["label"] * token.is_label + ["special"] * token.is_special
    ids = ", ".join(map(str, token.ids))
    tip = f"id {ids}" + (", label" if token.is_label else "")
    text = _escape(token.text, keep="\n").replace("\n", "↵\n")
    return f'<span class="{" ".join(names)}" title="{tip}">{text}</span>'


def _escape(text: str, keep: str = "") -> str:
    return html.escape(terminal.visible(text, keep))
