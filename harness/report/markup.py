"""Pieces of an HTML page that needs no network: style, tables, images, escaped text.

In: texts, numbers, image bytes. Out: HTML. Invariants: `text` and a table's head are escaped; everything else is HTML that
the caller made.
"""

import base64
import html
from collections.abc import Iterable

from harness.report.text import format_metric

STYLE = """
:root{color-scheme:light dark;--line:#8885;--soft:#8882}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2em 0 .5em;border-bottom:1px solid var(--line)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.7rem;margin:1rem 0}
.card{background:var(--soft);border-radius:.5rem;padding:.6rem .8rem;display:flex;flex-direction:column}
.card b{display:block;font-size:1.5rem;margin-top:auto}
.card small,caption,.note{opacity:.75;font-size:.85rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;width:100%}td,th{padding:.25rem .5rem;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:Canvas}tr{border-bottom:1px solid var(--line)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:.7rem;align-items:start}
img{width:100%;max-width:36rem;height:auto;background:#fff;border-radius:.4rem}
.warning{border-left:4px solid #c80;padding:.3rem .8rem;background:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem}dd{margin:0;overflow-wrap:anywhere}
.images{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.7rem}figure{margin:0}
figcaption{font-size:.8rem;overflow-wrap:anywhere}.small td{color:GrayText}.wide+.wide{margin-top:1rem}
@media(max-width:40rem){dl{grid-template-columns:1fr}dt{font-weight:600;margin-top:.3rem}}
@media print{body{max-width:none}h2{break-after:avoid}img,table{break-inside:avoid}}
"""


MANY_LINES, OPEN_LINES = 30, 20  # a table of more lines shows so many; a click shows the others


def table(head: list[str], lines: Iterable[list[str]], small: Iterable[bool] | None = None) -> str:
    """A table that scrolls by itself. head: texts, escaped here. lines: cells of HTML. small: which lines are grey."""
    lines = list(lines)
    greyed = list(small) if small is not None else [False] * len(lines)
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    rows = [
        f"<tr{' class=small' if grey else ''}>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>"
        for line, grey in zip(lines, greyed, strict=True)
    ]
    n_open = OPEN_LINES if len(rows) > MANY_LINES else len(rows)
    shown, folded = (
        f"<div class=wide><table><tr>{top}</tr>{''.join(some)}</table></div>" for some in (rows[:n_open], rows[n_open:])
    )
    return shown + (f"<details><summary>{len(rows) - n_open} more</summary>{folded}</details>" if rows[n_open:] else "")


def cell(value: float | None, interval: list[float] | None) -> str:
    """A metric with its interval below it."""
    between = f"<br><small class=note>{interval[0]:.2f} to {interval[1]:.2f}</small>" if interval else ""
    return format_metric(value) + between


def text(value: object) -> str:
    """Any value as text, escaped."""
    return html.escape(str(value))


def image(data: bytes, alt: str, kind: str = "png") -> str:
    """An image inside the page. alt: what it shows, escaped here. kind: png or jpeg."""
    return f'<img alt="{text(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
