"""Where a decay λ is drawn on an axis on which 0.9, 0.99 and 0.999 are equally far apart.

On a linear axis every decay worth comparing sits in the top few pixels, though λ = 0.99 forgets over 100 tokens and
λ = 0.999 over 1000. The axis is log10(λ/(1−λ)). It has no place for λ = 0, λ = 1 (no decay at all) and λ > 1 (growth),
which do occur; each has a tick of its own one unit beyond the rest, so that nothing is silently clipped or left out.
Both the still and the interactive figures place their values through this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Beyond six nines or four zeros fp32 medians are rounding: they share the last half unit.
LOWEST, HIGHEST = -4, 6
BEYOND = 0.5


@dataclass(frozen=True, kw_only=True)
class LambdaAxis:
    """A logit axis between two powers of ten, with edge ticks for 0, 1 and above 1 where the data needs them."""

    low: int
    high: int
    has_zero: bool
    has_one: bool
    has_growth: bool

    def place(self, value: float) -> float:
        """The position of λ on the axis; defined for every finite λ >= 0."""
        if value > 1.0:
            return self.high + 2.0
        if value == 1.0:
            return self.high + 1.0
        if value == 0.0:
            return self.low - 1.0
        logit = math.log10(value) - math.log10(1.0 - value)
        return min(max(logit, self.low - BEYOND), self.high + BEYOND)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels, lowest first."""
        ticked = [_tick(power) for power in range(self.low, self.high + 1)]
        inner = [(self.place(value), label) for value, label in ticked]
        zero = [(self.low - 1.0, "0")] if self.has_zero else []
        one = [(self.high + 1.0, "1")] if self.has_one or self.has_growth else []
        growth = [(self.high + 2.0, "> 1")] if self.has_growth else []
        return zero + inner + one + growth

    def limits(self) -> tuple[float, float]:
        """The ends of the axis: just beyond where the outermost values can be drawn."""
        positions = [position for position, _ in self.ticks()]
        return positions[0] - BEYOND - 0.05, positions[-1] + BEYOND + 0.05


def axis_for(values: Iterable[float]) -> LambdaAxis:
    """The narrowest axis that shows every λ given; 0.5 to 0.9 when there is none."""
    known = list(values)
    logits = [math.log10(v) - math.log10(1.0 - v) for v in known if 0.0 < v < 1.0]
    low = max(LOWEST, min(math.floor(min(logits, default=0.0) + 0.05), 0))
    high = min(HIGHEST, max(math.ceil(max(logits, default=1.0) - 0.05), 1))
    return LambdaAxis(
        low=low,
        high=high,
        has_zero=any(v == 0.0 for v in known),
        has_one=any(v == 1.0 for v in known),
        has_growth=any(v > 1.0 for v in known),
    )


def lambda_text(value: float) -> str:
    """λ with digits enough to tell it from 1 (0.99987, not 1.000) and from 0."""
    if value in (0.0, 1.0):
        return f"{value:.0f}"
    if value > 1.0:
        return f"{value:.4f}" if value >= 1.0001 else "> 1"
    if value < 0.001:
        return f"{value:.1e}"
    if 1.0 - value < 1e-6:
        return "> 0.999999"
    return f"{value:.{max(3, math.ceil(-math.log10(1.0 - value)) + 1)}f}"


def horizon_text(value: float) -> str:
    """How many tokens λ remembers, 1/(1−λ): endless at 1 and above."""
    if value >= 1.0:
        return "∞"
    horizon = 1.0 / (1.0 - value)
    return f"{horizon:.1f}" if horizon < 100 else f"{horizon:,.0f}"


def _tick(power: int) -> tuple[float, str]:
    if power == 0:
        return 0.5, "0.5"
    if power > 0:
        return 1.0 - 10.0**-power, "0." + "9" * power
    return 10.0**power, f"{10.0**power:.{-power}f}"
