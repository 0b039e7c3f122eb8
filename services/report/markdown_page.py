"""Prints the report as Markdown that GitHub and a terminal pager both show well."""

from __future__ import annotations

from collections.abc import Sequence

from services.report.page_content import Block, FigureSlot, Folded, Heading, Paragraph
from services.report.tables import Table

# A pipe would end a table cell, a less-than would start a tag.
ESCAPES = str.maketrans({"|": "\\|", "<": "&lt;", ">": "&gt;", "*": "\\*", "_": "\\_", "`": "\\`", "[": "\\["})


def markdown_page(blocks: Sequence[Block]) -> str:
    """The blocks as one Markdown document ending in a newline."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level=level, text=text):
            return f"{'#' * level} {_cell(text)}"
        case Paragraph(text=text):
            return " ".join(text.split()).translate(ESCAPES).replace("\\*\\*", "**")
        case FigureSlot(still=still, alt=alt):
            return f"![{_cell(alt)}]({still})"
        case Folded(summary=summary, table=table):
            return f"<details><summary>{_cell(summary)}</summary>\n\n{_table(table)}\n\n</details>"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    rule = ["---:" if name in table.numeric else "---" for name in table.header]
    lines = [[_cell(c) for c in table.header], rule, *([_cell(c) for c in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).translate(ESCAPES)
