"""No decay: λ = 1, plain linear attention that forgets nothing.

It is the baseline every decay has to beat. The paper runs it only together with the delta rule (Table 9).
"""

from __future__ import annotations

from decay_core.decay import ConstantDecay


class NoDecay(ConstantDecay):
    """Constant; no parameters."""

    def constants(self) -> list[float]:
        return [0.0] * self.place.heads
