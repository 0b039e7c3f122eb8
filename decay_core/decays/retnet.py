"""RetNet's decay: a fixed λ = 1 - 2^{-5-j} for head j = 0, 1, ..., the same in every layer.

Source: RetNet (arXiv 2307.08621); the paper does not run it.
"""

from __future__ import annotations

import math

from decay_core.decay import ConstantDecay


class RetNet(ConstantDecay):
    """Constant per head; no parameters."""

    def constants(self) -> list[float]:
        return [math.log1p(-(2.0 ** (-5 - j))) for j in range(self.place.heads)]
