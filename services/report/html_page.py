"""Prints the report as one HTML page whose figures can be explored, without a network.

The plotting library lies beside the page as a file of its own; in a browser without scripts the still picture is shown
in the figure's place. A click on a column's name sorts a table by it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from services.report.page_content import Block, FigureSlot, Folded, Heading, Paragraph
from services.report.tables import Table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; }
body { max-width: 84rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .4rem; }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p { max-width: 52rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .5rem; border-bottom: 1px solid #e6e6e6; text-align: left; vertical-align: top; }
th { font-weight: 600; cursor: pointer; border-bottom: 2px solid #bbb; }
td.n, th.n { text-align: right; }
td { white-space: nowrap; }
td:last-child:not(.n) { white-space: normal; }
tbody tr:hover { background: #f5f7fa; }
img { max-width: 100%; height: auto; }
figure { margin: 1.5rem 0; }
summary { cursor: pointer; }
"""

SORT = """
document.querySelectorAll("th").forEach(function (head) {
  head.addEventListener("click", function () {
    var column = head.cellIndex, body = head.closest("table").tBodies[0];
    var up = head.dataset.up !== "1";
    head.dataset.up = up ? "1" : "0";
    function key(row) {
      var text = row.cells[column].textContent, number = parseFloat(text.replace(/,/g, ""));
      return isNaN(number) ? text : number;
    }
    Array.from(body.rows).sort(function (a, b) {
      var x = key(a), y = key(b);
      var order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : (typeof x === "number" ? -1 : 1);
      return up ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""


def html_page(title: str, blocks: Sequence[Block], moving: Mapping[str, str], library: str) -> str:
    """The blocks as a page; `moving` has the interactive fragments by key, `library` is the script's relative path."""
    body = "\n".join(_html(block, moving) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<script src="{html.escape(library)}"></script>\n</head>\n'
        f"<body>\n{body}\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def _html(block: Block, moving: Mapping[str, str]) -> str:
    match block:
        case Heading(level=level, text=text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text=text):
            parts = [html.escape(part) for part in text.split("**")]
            return f"<p>{''.join(f'<strong>{p}</strong>' if i % 2 else p for i, p in enumerate(parts))}</p>"
        case FigureSlot():
            return _figure(block, moving)
        case Folded(summary=summary, table=table):
            return f"<details><summary>{html.escape(summary)}</summary>\n{_table(table)}\n</details>"
        case Table():
            return _table(block)


def _figure(slot: FigureSlot, moving: Mapping[str, str]) -> str:
    still = f'<img src="{html.escape(slot.still)}" alt="{html.escape(slot.alt)}">'
    if slot.moving is None:
        return f"<figure>{still}</figure>"
    opened = f"<details><summary>the same as a still picture, a panel a method</summary>{still}</details>"
    still_below = opened if slot.moving.startswith("decay:") else ""
    return f"<figure>{moving[slot.moving]}<noscript>{still}</noscript>{still_below}</figure>"


def _table(table: Table) -> str:
    marks = ["n" if name in table.numeric else "" for name in table.header]
    head = "".join(_cell("th", text, mark) for text, mark in zip(table.header, marks, strict=True))
    rows = [
        "<tr>" + "".join(_cell("td", text, mark) for text, mark in zip(row, marks, strict=True)) + "</tr>" for row in table.rows
    ]
    top = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    return f'<div class="wide"><table>{top}<tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>"


def _cell(tag: str, text: str, mark: str) -> str:
    attribute = f' class="{mark}"' if mark else ""
    return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"
