"""Claims about where λ is drawn and how it is written."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.report.lambda_axis import axis_for, horizon_text, lambda_text


def test_each_further_nine_is_one_step() -> None:
    axis = axis_for([0.5, 0.9, 0.99, 0.999])
    steps = [axis.place(v) for v in (0.9, 0.99, 0.999)]
    assert steps[1] - steps[0] == pytest.approx(1.0, abs=0.05)
    assert steps[2] - steps[1] == pytest.approx(1.0, abs=0.01)


@given(st.lists(st.floats(min_value=0.0, max_value=1.5), min_size=1, max_size=20))
def test_every_lambda_is_inside_the_limits_and_in_order(values: list[float]) -> None:
    axis = axis_for(values)
    low, high = axis.limits()
    positions = [axis.place(v) for v in sorted(values)]
    assert positions == sorted(positions)
    assert low <= positions[0] and positions[-1] <= high


def test_zero_one_and_growth_have_ticks_of_their_own() -> None:
    labels = [label for _, label in axis_for([0.0, 0.7, 1.0, 1.0465]).ticks()]
    assert labels == ["0", "0.5", "0.9", "1", "> 1"]


def test_ticks_that_nothing_needs_are_absent() -> None:
    assert [label for _, label in axis_for([0.7, 0.985]).ticks()] == ["0.5", "0.9", "0.99"]


def test_an_axis_without_values_still_has_ticks() -> None:
    assert len(axis_for([]).ticks()) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (1.0465, "1.0465"),
        (0.8, "0.800"),
        (0.99987, "0.99987"),
        (0.0003, "3.0e-04"),
        (1 - 1e-9, "> 0.999999"),
        (math.nextafter(1.0, 2.0), "> 1"),
        (1 - 4e-7, "> 0.999999"),
    ],
)
def test_lambda_is_never_rounded_to_one(value: float, text: str) -> None:
    assert lambda_text(value) == text


def test_memory_is_endless_without_decay() -> None:
    assert [horizon_text(v) for v in (0.5, 0.999, 1.0, 1.01)] == ["2.0", "1,000", "∞", "∞"]
