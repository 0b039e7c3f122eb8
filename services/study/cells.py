"""The cells of a study's space: every combination of its axes, kept, or refused with reason, kind and nearest valid point.

What is unusual: a refusal is data. A block may name combinations that make no sense; they are listed and counted, and only a
block of which nothing is left is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from decay_core.design import DesignPoint, Misspelt, Refusal
from decay_core.model import ModelConfig
from services.study.file import DecayChoice, Grid, Study, StudyError


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: its point and, when refused, why, of which kind, and the nearest valid one.

    `size` is set where the point makes sense and only does not go with that size.
    """

    point: DesignPoint
    size: str = ""
    reason: str = ""
    kind: str = ""
    nearest: str = ""

    @property
    def name(self) -> str:
        """The point's name, and the size where the refusal is about one."""
        return f"{self.point.name} at {self.size}" if self.size else self.point.name


def cells(study: Study) -> list[Cell]:
    """Every distinct cell of the study's space, in file order.

    Raises StudyError for a misspelt cell, however many others of its block are valid, and for a block with no valid cell.
    """
    found: dict[DesignPoint, Cell] = {}
    for index, grid in enumerate(study.space):
        block = [_judge(point, index) for point in _product(grid)]
        if all(cell.reason for cell in block):
            first = block[0]
            nearest = f"nearest valid: {first.nearest}" if first.nearest else "change one of its axes"
            raise StudyError(f"space.{index} has no valid point: {_as_written(first.point)}: {first.reason}; {nearest}")
        found.update((cell.point, cell) for cell in block)
    return list(found.values())


def fitting(configs: Iterable[ModelConfig]) -> tuple[list[ModelConfig], list[Cell]]:
    """Which of the models of one size can be built, and the others as refused cells.

    Raises StudyError where none can.
    """
    kept: list[ModelConfig] = []
    refused: list[Cell] = []
    for config in configs:
        try:
            config.check()
            kept.append(config)
        except Refusal as refusal:
            refused.append(_refused(config.point, refusal, config.size.name))
    if not kept:
        raise StudyError(f"sizes: no point of the space goes with {refused[0].size}: {refused[0].reason}; leave that size out")
    return kept, refused


def by_reason(refused: Iterable[Cell]) -> list[list[Cell]]:
    """Refused cells in groups of one reason, the largest group first."""
    groups: dict[str, list[Cell]] = {}
    for cell in refused:
        groups.setdefault(cell.reason, []).append(cell)
    return sorted(groups.values(), key=len, reverse=True)


def _judge(point: DesignPoint, block: int) -> Cell:
    try:
        point.check()
    except Misspelt as error:
        raise StudyError(f"space.{block}: {error}") from error
    except Refusal as refusal:
        return _refused(point, refusal)
    return Cell(point=point)


def _refused(point: DesignPoint, refusal: Refusal, size: str = "") -> Cell:
    return Cell(point=point, size=size, reason=refusal.reason, kind=refusal.kind, nearest=str(refusal.nearest or ""))


def _as_written(point: DesignPoint) -> str:
    defaults = DesignPoint(decay=point.decay)
    shown = {"decay", "granularity", "share", "position", "form"}
    pairs = point.to_dict().items()
    return ", ".join(f"{key}={value}" for key, value in pairs if key in shown or value != getattr(defaults, key))


def _product(grid: Grid) -> list[DesignPoint]:
    axes = [name for name in Grid.model_fields if name != "decay"]
    lists: list[list[Any]] = [_listed(getattr(grid, name)) for name in axes]
    return [
        DesignPoint(decay=decay, p=p, **dict(zip(axes, values, strict=True)))
        for (decay, p), *values in itertools.product(_decays(grid.decay), *lists)
    ]


def _listed(choice: Any) -> list[Any]:
    return list(choice) if isinstance(choice, list) else [choice]


def _decays(choice: DecayChoice | list[DecayChoice]) -> list[tuple[str, float | None]]:
    if isinstance(choice, list):
        return [pair for item in choice for pair in _decays(item)]
    if isinstance(choice, str):
        return [(choice, None)]
    return [(name, float(p)) for name, values in choice.items() for p in (values if isinstance(values, list) else [values])]
