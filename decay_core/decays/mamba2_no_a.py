"""Mamba2's decay without its rate: log λ = -softplus(f + δ), which is logistic with a learned offset.

Source: the paper's section 5.1 (ablation "w/o A").
"""

from decay_core.decays.mamba2 import Mamba2


class Mamba2WithoutA(Mamba2):
    """Mamba2 with a = 0."""

    has_rate = False
