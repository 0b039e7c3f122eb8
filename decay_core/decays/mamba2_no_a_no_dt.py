"""Mamba2's decay without rate and step bias: log λ = -softplus(f), plain σ(-f).

Source: the paper's section 5.1 (ablation "w/o A, Δ").
"""

from decay_core.decays.mamba2 import Mamba2


class Mamba2WithoutAAndDelta(Mamba2):
    """Mamba2 with a = 0 and δ = 0."""

    has_rate = False
    has_step = False
