"""A recall study's report has the accuracy beside the state size, as table, numbers and figure; a study on text has neither."""

import csv
import io
from pathlib import Path

import pytest
import rich.console
from synthetic_study import many_methods, summary_of, trial

from services.report import build_report, console_table, recall_figures
from services.report.recall_figures import moving_recall_figure, recall_figure
from services.report.seed_spread import rank_by_size
from services.study.result import TrialResult


def recall_trials() -> list[TrialResult]:
    """Two methods at three widths of a head, one of them with two seeds."""
    trials = []
    for dh, state, seeds in ((16, 4096, (1, 2)), (32, 8192, (1,)), (64, 16384, (1,))):
        for seed in seeds:
            share = min(1.0, state / 16384 + 0.1 * seed)
            changes = {"state_size": state, "held_out_sequence_accuracy": share / 2, "unigram_entropy": 4.1589}
            trials.append(trial(f"none-scalar-delta-dh{dh}", seed=seed, loss=4 - share, held_out_accuracy=share, **changes))
    trials.append(trial("softmax-rope", seed=1, loss=0.2, held_out_accuracy=1.0, state_size=16384, unigram_entropy=4.1589,
                        trained=()))  # fmt: skip
    return trials


def test_accuracy_and_state_size_are_in_table_csv_and_figure(tmp_path: Path) -> None:
    results = recall_trials()
    files = build_report(summary_of(results), results, tmp_path)
    text = files.markdown.read_text()
    assert "| 8,192 | 60.0 % |" in text and "| 4,096 | 40.0 % ± 7.1 % |" in text
    assert "highest accuracy is 100.0 %, by softmax-rope" in text.replace("\\", "")
    assert "![exact-match accuracy against state size](figures/accuracy.png)" in text.replace("\\", "")
    assert (tmp_path / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with files.table_csv.open(newline="") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    assert float(rows["none-scalar-delta-dh16"]["held_out_accuracy"]) == pytest.approx(0.4, rel=1e-12)
    assert rows["softmax-rope"]["state_size"] == "16384"
    page = files.html.read_text()
    assert 'id="accuracy"' in page and page.count('"none-scalar-delta"') >= 1  # one line joins the three widths


def test_of_varied_recipes_the_figure_has_the_best_of_each_method() -> None:
    results = [
        trial(f"gla-vector lr={lr}", held_out_accuracy=share, state_size=size, varied={"lr": lr}, size=name)
        for name, size, shares in (("nano", 8192, (0.2, 0.6)), ("micro", 65536, (0.9, 0.3)))
        for lr, share in zip((0.001, 0.003), shares, strict=True)
    ]
    (line,) = recall_figures._lines(rank_by_size(results)).items()
    assert (line[0], [row.accuracy for row in line[1]]) == ("gla-vector", [0.6, 0.9])


def test_the_console_says_how_many_answers_are_right() -> None:
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(console_table(summary_of(recall_trials()), recall_trials()))
    assert "60.0 %" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_study_on_text_says_nothing_of_accuracy(tmp_path: Path) -> None:
    results = many_methods(3)
    files = build_report(summary_of(results), results, tmp_path)
    assert "accuracy" not in files.markdown.read_text() and not (tmp_path / "figures" / "accuracy.png").exists()


def test_many_methods_and_sizes_are_drawn_without_a_warning() -> None:
    results = [
        t.model_copy(update={"held_out_accuracy": 0.5, "state_size": 2048 * (1 + len(t.size))})
        for size in ("nano", "micro")
        for t in many_methods(40, size=size)
    ]
    rankings = rank_by_size(results)
    assert len(recall_figure(rankings)) > 10_000
    assert moving_recall_figure(rankings, "accuracy").count('"name":"') >= 40


def test_results_of_earlier_releases_are_still_read() -> None:
    old = trial().model_dump(mode="json")
    for key in ("held_out_accuracy", "held_out_sequence_accuracy", "state_size"):
        del old[key]
    assert TrialResult.model_validate(old).held_out_accuracy is None
