"""What the paper prints: every row of its tables, linked to our design points, and what is known to be wrong with each.

The rows and the errata are data (tune_spaces/paper/published.csv and errata.yaml); nothing is corrected on reading. A row
links to a design point by the name of its `as_published` form, because a row stands for both: the text describes one, the
authors' code ran the other. Surprising: 120 rows are 117 runs, since the tables of simple decay repeat a row of Mamba2, and
one run that no table prints is a row without figures.
Source: arXiv 2509.05282, Tables 2 to 4 and 6 to 9 (Table 5 is sizes).
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from decay_core import decays
from decay_core.design import GRANULARITIES, DesignPoint
from decay_core.sizes import SIZES, Size

FOLDER = Path(__file__).parents[2] / "tune_spaces" / "paper"
AXES = ("size", "group", "method", "granularity", "share", "pos", "p")  # the paper's own words for a run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One printed row. `columns` are the file's, as text; an empty figure was not printed."""

    columns: Mapping[str, str]
    point: DesignPoint

    @property
    def table(self) -> str:
        """The table's number; empty for the run that no table prints."""
        return self.columns["table"]

    @property
    def size(self) -> str:
        """The size, as decay_core.sizes spells it."""
        return self.columns["size"]

    @property
    def loss(self) -> float | None:
        """The printed loss in nats per token: training loss of the last logged steps."""
        return float(self.columns["loss"]) if self.columns["loss"] else None

    @property
    def run(self) -> tuple[str, str]:
        """What a repeated row has in common with the first: size and name of the point."""
        return self.size, self.point.name


@dataclass(frozen=True, kw_only=True)
class Erratum:
    """One thing to know before a row is compared with anything. `where` selects rows: column to value or values."""

    id: str
    kind: str
    what: str
    where: Mapping[str, tuple[str, ...]]
    source: str
    consequence: str

    def concerns(self, row: Row) -> bool:
        """Whether the row is one of those selected; an empty selection is every row."""
        return all(row.columns[column] in values for column, values in self.where.items())


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every row, in the order of the tables."""
    with open(FOLDER / "published.csv", encoding="utf-8", newline="") as file:
        return tuple(Row(columns=columns, point=_point(columns)) for columns in csv.DictReader(file))


@functools.cache
def runs() -> tuple[Row, ...]:
    """One row for each run of the paper: the first where two tables print the same."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows():
        first.setdefault(row.run, row)
    return tuple(first.values())


def published_rows(point: DesignPoint, size: Size) -> tuple[Row, ...]:
    """The rows that print a result of `point` at `size`, in either form; none where the paper has no such run.

    A point with a write or a head width of its own, or with a GLU that `match` gave another width, is another model than the
    paper's, and links to nothing.
    """
    if point.write is not None or point.head_dim is not None or size != SIZES.get(size.name):
        return ()
    return _by_run().get((size.name, replace(point, form="as_published").name), ())


def published_loss(point: DesignPoint, size: Size) -> float | None:
    """The loss printed for `point` at `size`, in the first table that prints one."""
    return next((row.loss for row in published_rows(point, size) if row.loss is not None), None)


@functools.cache
def errata() -> tuple[Erratum, ...]:
    """Every erratum, in file order."""
    raw = yaml.safe_load((FOLDER / "errata.yaml").read_text(encoding="utf-8"))
    return tuple(Erratum(**{**entry, "where": _selection(entry["where"])}) for entry in raw)


def errata_of(row: Row) -> tuple[Erratum, ...]:
    """The errata that concern one row, those of every row included."""
    return tuple(erratum for erratum in errata() if erratum.concerns(row))


@functools.cache
def _by_run() -> dict[tuple[str, str], tuple[Row, ...]]:
    found: dict[tuple[str, str], tuple[Row, ...]] = {}
    for row in rows():
        found[row.run] = (*found.get(row.run, ()), row)
    return found


def _point(columns: Mapping[str, str]) -> DesignPoint:
    """The design point of a row. "No decay" and softmax have no granularity in the paper: here it is scalar."""
    granularity = columns["granularity"]
    return DesignPoint(
        decay=columns["decay"],
        p=float(columns["p"]) if decays.get(columns["decay"]).takes_p else None,
        granularity=granularity if granularity in GRANULARITIES else "scalar",
        share=columns["share"] == "1",
        position=columns["pos"],
        transition=columns["transition"],
    )


def _selection(where: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    return {column: tuple(map(str, value if isinstance(value, list) else [value])) for column, value in where.items()}
