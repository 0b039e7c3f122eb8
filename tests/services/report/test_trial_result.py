"""Claims about the files in which a trial and a study say what they found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from synthetic_study import layer_profile, summary_of, trial

from services.study.result import StudySummary, TrialResult, UnreadableResult, read_result, read_summary, write_record


def test_a_result_survives_writing_and_reading_exactly(tmp_path: Path) -> None:
    result = trial(loss=4.123456789012345, trained=(0.1 + 0.2, 1.0, 1.0465), bits_per_byte=1.25)
    write_record(tmp_path / "trials" / "a" / "result.json", result)
    assert read_result(tmp_path / "trials" / "a" / "result.json") == result


def test_a_summary_survives_writing_and_reading_exactly(tmp_path: Path) -> None:
    summary = summary_of([trial()], n_trials=2, failed=[{"name": "gla-vector", "reason": "NaN at step 3"}])
    write_record(tmp_path / "summary.json", summary)
    assert read_summary(tmp_path / "summary.json") == summary


def test_the_same_result_is_the_same_bytes() -> None:
    assert trial().to_json() == trial().to_json()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_a_loss_that_is_no_loss_is_refused(bad: float) -> None:
    with pytest.raises(ValidationError, match="held_out_loss"):
        trial(loss=4.0, held_out_loss=bad)


def test_nan_in_a_file_is_refused_in_one_line_with_place_and_field(tmp_path: Path) -> None:
    record = json.loads(trial().to_json()) | {"train_loss_last_100": math.nan}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(record))
    with pytest.raises(UnreadableResult) as error:
        read_result(path)
    message = str(error.value)
    assert str(path) in message and "train_loss_last_100" in message and "\n" not in message


def test_nan_in_a_design_point_is_refused() -> None:
    with pytest.raises(ValidationError, match="finite"):
        trial(point=trial().point | {"p": math.nan})


def test_half_a_file_is_refused_as_unreadable(tmp_path: Path) -> None:
    text = trial().to_json()
    (tmp_path / "result.json").write_text(text[: len(text) // 2])
    with pytest.raises(UnreadableResult, match=r"result\.json"):
        read_result(tmp_path / "result.json")


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        trial(accuracy=0.5)


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        trial().seed = 43  # type: ignore[misc]


def test_a_point_without_an_axis_is_refused() -> None:
    with pytest.raises(ValidationError, match="point lacks form, share"):
        trial(point={k: v for k, v in trial().point.items() if k not in ("share", "form")})


def test_sharing_is_still_a_truth_value_after_reading() -> None:
    again = TrialResult.from_json(trial("gla-vector-share").to_json())
    assert again.point["share"] is True and again.point["p"] is None


def test_layers_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="in order"):
        trial(decay_profile=(layer_profile(2, 0.9), layer_profile(1, 0.9)))


def test_profiles_of_different_depth_are_refused() -> None:
    with pytest.raises(ValidationError, match="number of layers"):
        trial(trained=(0.9, 0.9), initial=(0.9,))


def test_a_median_outside_its_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="not in order"):
        type(layer_profile(1, 0.9)).model_validate(layer_profile(1, 0.9).model_dump() | {"median": 0.99999999})


@pytest.mark.parametrize("value", [0.0, 1.0, 1.0465])
def test_lambda_of_zero_one_and_above_is_a_result(value: float) -> None:
    assert trial(trained=(value,)).decay_profile[0].median == value


def test_a_summary_with_more_outcomes_than_trials_is_refused() -> None:
    with pytest.raises(ValidationError, match="only 1 were planned"):
        summary_of([trial()], failed=[{"name": "x", "reason": "y"}])


def test_trials_nobody_named_are_still_counted() -> None:
    summary: StudySummary = summary_of([trial()], n_trials=4, failed=[{"name": "x", "reason": "y"}])
    assert (summary.n_failed, summary.n_refused, summary.n_unnamed) == (1, 0, 2)


def test_writing_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    write_record(tmp_path / "result.json", trial())
    write_record(tmp_path / "result.json", trial(loss=4.0))
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert read_result(tmp_path / "result.json").held_out_loss == 4.0
