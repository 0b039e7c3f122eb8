"""Histograms of λ agree with exact quantiles, merge over ranks, and keep λ = 0, 1 and above apart."""

import math

import pytest
import torch

from decay_core.decay_stats import BINS, DecayStats, bin_edges, decay_profile
from decay_core.design import DesignPoint
from decay_core.model import ModelConfig, build_model
from decay_core.sizes import get_size

HALF_BIN = 0.0025 + 1e-6  # half a bin in logit, at the steepest point of the sigmoid


def sample(seed, shift=0.0):
    return torch.nn.functional.logsigmoid(torch.randn(2, 50, 3, 7, generator=torch.Generator().manual_seed(seed)) * 3 + shift)


def test_quantiles_are_within_half_a_bin_of_the_exact_lower_ones():
    log_decay = sample(0)
    stats = DecayStats(1, "cpu")
    stats.observe(0, log_decay)
    (summary,) = stats.summary()
    exact = log_decay.exp().flatten().sort().values
    for q in (5, 25, 50, 75, 95):
        assert summary[f"p{q:02d}"] == pytest.approx(exact[math.floor(q / 100 * (len(exact) - 1))].item(), abs=HALF_BIN)
    assert summary["mean"] == pytest.approx(exact.mean().item(), abs=HALF_BIN)
    assert (summary["min"], summary["max"]) == (exact[0].item(), exact[-1].item())
    assert summary["horizon"] == 1 / (1 - summary["p50"])
    assert summary["share_near_0"] == pytest.approx((exact < 0.05).float().mean().item(), abs=0.02)
    assert summary["share_near_1"] == pytest.approx((exact > 0.99).float().mean().item(), abs=0.02)


def test_statistics_of_two_ranks_merge_into_those_of_all_data():
    ranks = [DecayStats(2, "cpu") for _ in range(2)]
    whole = DecayStats(2, "cpu")
    for seed, rank in enumerate(ranks):
        for layer in (0, 1):
            for stats in (rank, whole):
                stats.observe(layer, sample(seed, shift=layer))
    counts = ranks[0].tensors()[0] + ranks[1].tensors()[0]
    extremes = torch.maximum(ranks[0].tensors()[1], ranks[1].tensors()[1])
    assert DecayStats.from_tensors(counts, extremes).summary() == whole.summary()


def test_zero_one_and_above_one_land_outside_the_inner_bins():
    stats = DecayStats(2, "cpu")
    stats.observe(0, torch.tensor([-math.inf, -math.inf, 0.0, 0.1]))
    counts, _ = stats.tensors()
    assert counts[0, 0] == 2 and counts[0, -1] == 2 and counts.sum() == 4
    assert counts.shape == (2, BINS) and len(bin_edges()) == BINS - 1
    summary, empty = stats.summary()
    assert summary["min"] == 0 and summary["max"] == pytest.approx(math.exp(0.1))
    assert empty == {}


def test_a_value_lies_between_the_edges_of_its_bin():
    decay = torch.tensor([0.3, 0.5001, 0.97])
    stats = DecayStats(1, "cpu")
    stats.observe(0, decay.log())
    edges = bin_edges()
    for index, logit in zip(stats.counts[0].nonzero().flatten().tolist(), torch.logit(decay).tolist(), strict=True):
        assert edges[index - 1] <= logit <= edges[index]


@pytest.mark.parametrize("point", [DesignPoint(decay="mamba2"), DesignPoint(decay="tnl", granularity="scalar")])
def test_profile_takes_lower_medians_over_positions_and_channels(point):
    model = build_model(ModelConfig(point=point, size=get_size("nano"), vocab_size=64), seed=0)
    tokens = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    seen = {}
    model(tokens, observe=lambda layer, log_decay: seen.update({layer: log_decay}))
    profile = decay_profile(model, tokens)
    assert [row["layer"] for row in profile] == [0, 1]
    for row in profile:
        decay = seen[row["layer"]].double().exp().flatten()
        assert row["median"] == decay.median().item()
        assert row["min"] <= row["p25"] <= row["median"] <= row["p75"] <= row["max"]
        assert row["mean"] == pytest.approx(decay.mean().item())


def test_a_nan_is_counted_at_the_bottom_and_never_crashes_the_step():
    stats = DecayStats(1, "cpu")
    stats.observe(0, torch.tensor([math.nan, math.log(0.5), 0.0]))
    counts, extremes = stats.tensors()
    assert int(counts.sum()) == 3
    assert int(counts[0, 0]) == 1
    assert extremes[0].tolist() == [0.0, 1.0]
