"""Claims about ranking and about what the spread between seeds can separate."""

from __future__ import annotations

import math

import pytest
from synthetic_study import many_methods, trial

from services.report.csv_files import trial_csv
from services.report.seed_spread import rank_by_size
from services.report.tables import headline, noise_sentences, rank_list


def test_the_lowest_held_out_loss_is_first() -> None:
    (ranking,) = rank_by_size([trial("gla-vector", loss=4.3), trial("hgrn2-vector", loss=4.1), trial(loss=4.2)])
    assert [(c.rank, c.method) for c in ranking.rows] == [(1, "hgrn2-vector"), (2, "mamba2-vector"), (3, "gla-vector")]
    assert ranking.above_best(ranking.rows[2]) == pytest.approx(0.2, abs=1e-12)


def test_sizes_are_never_ranked_against_each_other() -> None:
    small, large = rank_by_size([trial(size="micro", loss=3.0), trial("gla-vector", loss=4.3), trial(loss=4.2)])
    assert (small.size, [c.rank for c in small.rows]) == ("nano", [1, 2])
    assert (large.size, large.above_best(large.rows[0])) == ("micro", 0.0)


def test_pooled_sd_weights_by_degrees_of_freedom() -> None:
    results = [trial(loss=x, seed=i) for i, x in enumerate((4.0, 4.1, 4.2))]
    results += [trial("gla-vector", loss=x, seed=i) for i, x in enumerate((4.5, 4.7))]
    (ranking,) = rank_by_size(results)
    # variances 0.01 (2 degrees of freedom) and 0.02 (1): (2 * 0.01 + 0.02) / 3
    assert ranking.pooled_sd == pytest.approx(math.sqrt(0.04 / 3), rel=1e-12)
    assert ranking.degrees_of_freedom == 3


def test_close_pairs_are_not_separated_and_far_pairs_are() -> None:
    results = [trial(loss=4.0 + d, seed=s) for s, d in ((1, -0.01), (2, 0.01))]
    results += [trial("gla-vector", loss=4.02 + d, seed=s) for s, d in ((1, -0.01), (2, 0.01))]
    results += [trial("tnl-scalar", loss=4.2 + d, seed=s) for s, d in ((1, -0.01), (2, 0.01))]
    (ranking,) = rank_by_size(results)
    # s = 0.01414; with two seeds each the limit is 2 s = 0.02828
    assert [ranking.not_separated(c) for c in ranking.rows] == [[2], [1], []]


def test_one_method_under_several_recipes_is_several_rows_and_only_seeds_are_pooled() -> None:
    results = [
        trial(f"gla-vector lr={lr}", loss=loss + d, seed=seed, name=f"gla-vector-nano-lr{lr}-s{seed}", varied={"lr": lr})
        for lr, loss in ((0.001, 4.0), (1e-05, 5.0))
        for seed, d in ((1, -0.01), (2, 0.01))
    ]
    (ranking,) = rank_by_size(results)
    assert [(row.label, len(row.trials)) for row in ranking.rows] == [("gla-vector lr=0.001", 2), ("gla-vector lr=1e-05", 2)]
    # two rows, each with one degree of freedom and variance 0.0002: the recipes' distance of 1 is in neither
    assert ranking.degrees_of_freedom == 2 and ranking.pooled_sd == pytest.approx(math.sqrt(0.0002))
    (line,) = {line.split(",")[-1] for line in trial_csv(results[:2]).splitlines()[1:]}
    assert trial_csv(results).splitlines()[0].endswith("point_share,varied_lr") and line == "0.001"


def test_one_seed_each_gives_no_noise_floor() -> None:
    (ranking,) = rank_by_size([trial(loss=4.0), trial("gla-vector", loss=4.0001)])
    assert ranking.pooled_sd is None and ranking.not_separated(ranking.rows[0]) == []
    assert "no noise floor" in noise_sentences(ranking)[0]
    assert "not known" in headline(ranking)


def test_a_single_seed_borrows_the_spread_of_the_others() -> None:
    results = [trial(loss=4.0, seed=1), trial(loss=4.02, seed=2), trial("gla-vector", loss=4.04, seed=1)]
    (ranking,) = rank_by_size(results)
    assert ranking.not_separated(ranking.rows[1]) == [1]
    assert any("borrows" in s for s in noise_sentences(ranking))


def test_equal_losses_at_different_seeds_are_called_suspicious() -> None:
    (ranking,) = rank_by_size([trial(loss=4.0, seed=1), trial(loss=4.0, seed=2)])
    assert any("seed changed nothing" in s for s in noise_sentences(ranking))


def test_the_order_of_the_input_does_not_matter() -> None:
    results = many_methods(9, seeds=(1, 2))
    assert rank_by_size(results) == rank_by_size(results[::-1])


def test_the_same_trial_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="given twice"):
        rank_by_size([trial(), trial()])


def test_two_trials_with_one_seed_are_refused_unless_their_names_differ() -> None:
    with pytest.raises(ValueError, match="two trials with seed 42"):
        rank_by_size([trial(), trial(trial_id="other")])
    other = trial(trial_id="other", name="mamba2-vector-nano-lr0.001-s42")
    (ranking,) = rank_by_size([trial(), other])
    assert sorted(c.label for c in ranking.rows) == ["mamba2-vector", "mamba2-vector (lr0.001)"]


@pytest.mark.parametrize(
    ("ranks", "text"), [([], "none"), ([3], "3"), ([2, 3, 4, 7], "2–4, 7"), ([1, 3], "1, 3"), ([1, 2], "1–2")]
)
def test_ranks_are_written_as_runs(ranks: list[int], text: str) -> None:
    assert rank_list(ranks) == text
