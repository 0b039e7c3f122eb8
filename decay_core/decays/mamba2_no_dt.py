"""Mamba2's decay without its step bias: log λ = -e^a · softplus(f).

What is surprising: its initial median λ is 0.0027, because softplus(0) = 0.69 meets rates up to 16. Most memory is gone
in one step.
Source: the paper's section 5.1 (ablation "w/o Δ").
"""

from decay_core.decays.mamba2 import Mamba2


class Mamba2WithoutDelta(Mamba2):
    """Mamba2 with δ = 0."""

    has_step = False
