"""TransNormer's decay: a fixed λ per head and layer, shorter memory in the first layers, longer in the last.

What is surprising: the paper's Table 1 and its public code are different functions.
`as_published`: log λ = -(8j/h)(1 - l/L), heads j = 1..h, layers l = 0..L-1. The paper does not say where j and l start:
j = 1..h are the slopes of ALiBi, from which 8j/h comes (j = 0 would be a head that never forgets, in every layer), and
l counts from 0 as the layers do elsewhere. Its first layers forget almost at once (median λ 0.01 with 12 heads).
`as_run`: log λ = -(1/n_j)(1 - l/(L-1) + 1e-5), n_j geometric from 2 to 256: medians from 0.95 to 0.999999.
With TPE the public code counts l from 1 (`as_run`): the last layer then has λ > 1, which overflows in models of few
layers and is refused there.
With one head n is the geometric mean of 2 and 256; with one layer the layer's factor is 1.
Source: paper Table 1; TransNormerLLM (arXiv 2307.14995).
"""

from __future__ import annotations

from decay_core.decay import ConstantDecay, DecayPlace

SHORTEST, LONGEST = 2.0, 256.0  # memory of the first and the last head, in tokens
LAYER_MARGIN = 1e-5  # keeps the last layer's λ below 1


class TransNormer(ConstantDecay):
    """Constant per head; no parameters."""

    def constants(self) -> list[float]:
        return slopes_as_run(self.place) if self.place.point.form == "as_run" else slopes_as_published(self.place)


def slopes_as_published(place: DecayPlace) -> list[float]:
    """log λ of every head by the paper's Table 1."""
    depth = 1 - (place.layer + place.layer_shift) / place.layers
    return [-8 * j / place.heads * depth for j in range(1, place.heads + 1)]


def slopes_as_run(place: DecayPlace) -> list[float]:
    """log λ of every head by the authors' public code."""
    layer = place.layer + place.layer_shift
    depth = 1 - layer / (place.layers - 1) + LAYER_MARGIN if place.layers > 1 else 1.0
    fractions = [j / (place.heads - 1) for j in range(place.heads)] if place.heads > 1 else [0.5]
    return [-depth / (SHORTEST * (LONGEST / SHORTEST) ** fraction) for fraction in fractions]
