"""What a model does with its decay: a histogram of λ per layer during training, and an exact profile at the end.

What is unusual: bins are even in logit(λ), because 0.99 and 0.999 are far apart in memory and 0.5 and 0.51 are not.
Counting happens on the device and never waits for it, so it may run inside a training step; counts of several ranks are
added up before reading. Read from a histogram, λ is known to half a bin, 0.01 in logit, which is at most 0.0025 in λ.
The memory horizon is 1/(1-λ) tokens.
Source: the paper's decay figures: per layer the median over positions and channels of one text. Medians are lower
medians.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

EDGE = 12.0  # logit(λ) from -12 (λ = 6e-6) to 12 (1 - λ = 6e-6)
INNER_BINS = 1200
BINS = INNER_BINS + 2  # the first and the last hold what lies outside
NEAR_ZERO, NEAR_ONE = 0.05, 0.99
_WIDTH = 2 * EDGE / INNER_BINS


def bin_edges() -> list[float]:
    """INNER_BINS + 1 edges in logit(λ); bin i lies between edges i-1 and i, bins 0 and BINS-1 outside."""
    return [-EDGE + _WIDTH * i for i in range(INNER_BINS + 1)]


class DecayStats:
    """Histograms and extremes of λ for every layer. Pass `observe` to the model's forward."""

    def __init__(self, layers: int, device: torch.device | str) -> None:
        self.counts = torch.zeros(layers, BINS, dtype=torch.int64, device=device)
        # Column 0 is the largest -λ, column 1 the largest λ: one MAX reduction merges both.
        self.extremes = torch.full((layers, 2), -math.inf, dtype=torch.float32, device=device)

    @torch.no_grad()
    def observe(self, layer: int, log_decay: Tensor) -> None:
        """Counts every element of log λ (any shape); no synchronisation with the device."""
        flat = log_decay.reshape(-1).float()
        if flat.numel() == 0:
            return
        flat = torch.nan_to_num(flat, nan=-math.inf, posinf=None, neginf=-math.inf)  # a NaN is found by the loss, not here
        inner = torch.floor((_logit(flat) + EDGE) / _WIDTH).clamp(-1, INNER_BINS)
        index = inner.long() + 1
        self.counts[layer].scatter_add_(0, index, torch.ones_like(index))
        decay = flat.exp()
        latest = torch.stack([(-decay).amax(), decay.amax()])
        self.extremes[layer] = torch.maximum(self.extremes[layer], latest)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(counts int64 (layers, BINS), extremes fp32 (layers, 2)), reduced over ranks in place by SUM and by MAX."""
        return self.counts, self.extremes

    @classmethod
    def from_tensors(cls, counts: Tensor, extremes: Tensor) -> DecayStats:
        """The statistics that `tensors` gave, reduced or not."""
        stats = cls(counts.shape[0], counts.device)
        stats.counts, stats.extremes = counts.clone(), extremes.clone()
        return stats

    def summary(self) -> list[dict[str, float]]:
        """One dict a layer: p05 to p95, mean, min, max, the shares below 0.05 and above 0.99, the horizon at the
        median.

        Empty dict for a layer without observations. Copies to the host.
        """
        pairs = zip(self.counts.cpu(), self.extremes.cpu(), strict=True)
        return [_summarise(counts, -float(low), float(high)) for counts, (low, high) in pairs]


def _logit(log_decay: Tensor) -> Tensor:
    """logit(λ) from log λ without computing 1 - λ; ±inf at λ = 0 and λ >= 1."""
    return log_decay - torch.log(-torch.expm1(log_decay.clamp(max=0.0)))


def _summarise(counts: Tensor, low: float, high: float) -> dict[str, float]:
    total = int(counts.sum())
    if total == 0:
        return {}
    centres = torch.sigmoid(-EDGE + _WIDTH * (torch.arange(INNER_BINS, dtype=torch.float64) + 0.5))
    ends = torch.tensor([[low, high]], dtype=torch.float64).T
    values = torch.cat([ends[:1, 0], centres, ends[1:, 0]]).clamp(low, high)
    below = counts.cumsum(0)
    summary = {f"p{q:02d}": float(values[_rank_bin(below, q / 100, total)]) for q in (5, 25, 50, 75, 95)}
    summary["mean"] = float((values * counts).sum() / total)
    summary["min"], summary["max"] = low, high
    summary["share_near_0"] = float(counts[values < NEAR_ZERO].sum() / total)
    summary["share_near_1"] = float(counts[values > NEAR_ONE].sum() / total)
    summary["horizon"] = _horizon(summary["p50"])
    return summary


def _rank_bin(below: Tensor, share: float, total: int) -> int:
    """The bin of the lower quantile: the element of rank floor(share · (n - 1)), counted from 0."""
    return int(torch.searchsorted(below, math.floor(share * (total - 1)) + 1))


def _horizon(decay: float) -> float:
    return 1 / (1 - decay) if decay < 1 else math.inf


@torch.no_grad()
def decay_profile(model: nn.Module, tokens_bt: Tensor) -> list[dict[str, Any]]:
    """Exact statistics of λ per layer on one text: layer, median, p25, p75, mean, min, max, horizon, over positions and
    channels.

    Quantiles are lower ones (an element of the sample), as torch.median takes the median.
    """
    profile: list[dict[str, Any]] = []

    def observe(layer: int, log_decay: Tensor) -> None:
        decay = log_decay.double().exp().flatten().sort().values
        quantile = {q: float(decay[math.floor(q * (decay.numel() - 1))]) for q in (0.25, 0.5, 0.75)}
        profile.append(
            {
                "layer": layer,
                "median": quantile[0.5],
                "p25": quantile[0.25],
                "p75": quantile[0.75],
                "mean": float(decay.mean()),
                "min": float(decay[0]),
                "max": float(decay[-1]),
                "horizon": _horizon(quantile[0.5]),
            }
        )

    model(tokens_bt, observe=observe)
    return profile
