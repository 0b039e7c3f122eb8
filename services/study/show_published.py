"""The published side of a plan: what the paper prints for each trial, and the errata that the cells point to.

What is unusual: an erratum has one number on the page however many rows it concerns, and those that concern every row have
none, since they would mark every cell.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.study.plan import Trial
from services.study.published import Erratum, errata, published_rows


class Published:
    """The rows that a plan's trials link to. False where there is none: then nothing is to be shown."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._rows = {trial.id: published_rows(trial.point, trial.config.size) for trial in trials}
        linked = [row for rows in self._rows.values() for row in rows]
        self._numbered = [one for one in errata() if one.where and any(map(one.concerns, linked))]

    def __bool__(self) -> bool:
        return any(self._rows.values())

    def cell(self, trial: Trial) -> str:
        """The printed loss, or losses where two tables differ, and the numbers of the errata, such as `2.530 [1]`."""
        rows = self._rows[trial.id]
        losses = dict.fromkeys(f"{row.loss:.3f}" for row in rows if row.loss is not None)
        said = " / ".join(losses) or ("not printed" if rows else "")
        numbers = [str(number) for number, one in enumerate(self._numbered, 1) if any(map(one.concerns, rows))]
        return f"{said} [{','.join(numbers)}]" if numbers else said

    def lines(self) -> list[str]:
        """The errata: the numbered ones, then those of every row."""
        numbered = [f"[{number}] {_text(one)}" for number, one in enumerate(self._numbered, 1)]
        head = "Published: the loss that the paper prints, in nats per token, with what is known of the row:"
        return [head, *numbered, *(f"Every row: {_text(one)}" for one in errata() if not one.where)]


def _text(erratum: Erratum) -> str:
    return f"{erratum.id} ({erratum.kind.replace('_', ' ')}): {erratum.what} {erratum.consequence}"
