"""The order of samples is a permutation per epoch, and a function of (seed, step) alone."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.data.order import INITIAL_HASH, SampleOrder, next_hash, shard

windows = st.integers(1, 700)
seeds = st.integers(-(2**63), 2**63)


@settings(deadline=None)
@given(windows, seeds, st.integers(0, 5))
def test_every_epoch_visits_each_window_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(SampleOrder(n, seed).ids(epoch, n)) == list(range(n))


@settings(deadline=None)
@given(windows, seeds, st.integers(1, 50), st.integers(0, 200))
def test_batches_are_slices_of_one_endless_order(n: int, seed: int, batch_size: int, step: int) -> None:
    order = SampleOrder(n, seed)
    one_by_one = [order.ids(i, 1)[0] for i in range(step * batch_size, (step + 1) * batch_size)]
    assert order.ids(step, batch_size) == one_by_one


@settings(deadline=None)
@given(windows, seeds, st.integers(1, 40), st.integers(0, 100))
def test_ranks_together_read_the_global_batch(n: int, seed: int, quarter: int, step: int) -> None:
    ids = SampleOrder(n, seed).ids(step, 4 * quarter)
    for world in (1, 2, 4):
        assert list(chain.from_iterable(shard(ids, rank, world) for rank in range(world))) == ids


@settings(deadline=None)
@given(st.integers(100, 10_000), seeds, seeds)
def test_seeds_and_epochs_give_different_orders(n: int, one: int, other: int) -> None:
    assert SampleOrder(n, one).ids(0, n) != SampleOrder(n, one).ids(1, n)
    if one != other:
        assert SampleOrder(n, one).ids(0, n) != SampleOrder(n, other).ids(0, n)


def test_order_does_not_change_between_platforms_and_versions() -> None:
    assert SampleOrder(1000, 42).ids(3, 6) == [386, 129, 704, 898, 593, 474]
    assert SampleOrder(5, 0).ids(0, 12) == [0, 2, 1, 3, 4, 1, 0, 4, 2, 3, 1, 3]
    assert SampleOrder(10**12, 7).ids(10**9, 2) == [475863769140, 556532964251]


def test_positions_are_unbiased_over_seeds() -> None:
    """The window drawn first is uniform over 7 windows: chi-square with 6 degrees, 22.5 is the 0.1 % point."""
    counts = [0] * 7
    for seed in range(7000):
        counts[SampleOrder(7, seed).ids(0, 1)[0]] += 1
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 22.5


def test_order_hash_tells_step_ids_and_history_apart() -> None:
    first = next_hash(INITIAL_HASH, 0, [1, 2])
    variants = [next_hash(INITIAL_HASH, 1, [1, 2]), next_hash(INITIAL_HASH, 0, [2, 1]), next_hash(first, 0, [1, 2]),
                next_hash(INITIAL_HASH, 0, [12]), next_hash(INITIAL_HASH, 0, [1, 2, 0])]
    assert len({first, *variants}) == 6
    assert first == next_hash(INITIAL_HASH, 0, (1, 2))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: SampleOrder(0, 1), "shorter seq_len"),
    (lambda: SampleOrder(3, 1).ids(-1, 2), "counts from 0"),
    (lambda: SampleOrder(3, 1).ids(0, 0), "at least 1 sequence"),
    (lambda: shard([1, 2, 3], 0, 2), "use a multiple of 2"),
    (lambda: shard([1, 2], 2, 2), "rank 2 of 2"),
])
def test_impossible_requests_are_refused_in_one_line(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
