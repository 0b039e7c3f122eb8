"""Claims about the report as a whole: what it shows, what it never hides, and that it is the same every time."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console
from synthetic_study import UNIGRAM, many_methods, summary_of, trial

from services.report import ReportFiles, build_report, console_table

OMITTED = {
    "n_trials": 5,
    "failed": [{"name": "gla-vector-nano-s42", "reason": "loss became NaN | at step 212"}],
    "unfinished": [{"name": "retnet-scalar-nano-s42", "reason": "the budget of 1 hour was spent"}],
    "refused": [{"name": "mamba2-vector-rope", "reason": "breaks shift invariance; nearest: mamba2-scalar-rope"}],
}


def printed(table: object, width: int = 100) -> str:
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def rows_of(files: ReportFiles) -> list[dict[str, str]]:
    with files.table_csv.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_rows_are_sorted_by_held_out_loss(tmp_path: Path) -> None:
    results = many_methods(12)
    rows = rows_of(build_report(summary_of(results), results, tmp_path))
    losses = [float(row["held_out_loss"]) for row in rows]
    assert losses == sorted(t.held_out_loss for t in results)
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, 13)]


def test_the_csv_gives_the_numbers_back_exactly(tmp_path: Path) -> None:
    result = trial(loss=4.123456789012345, trained=(0.1 + 0.2, 0.7, 0.99987654321))
    (row,) = rows_of(build_report(summary_of([result]), [result], tmp_path))
    assert float(row["held_out_loss"]) == result.held_out_loss
    assert float(row["below_unigram"]) == UNIGRAM - result.held_out_loss
    assert float(row["median_lambda_first_layer"]) == 0.1 + 0.2
    assert float(row["median_lambda_middle_layer"]) == 0.7
    assert float(row["median_lambda_last_layer"]) == 0.99987654321


def test_failed_unfinished_and_refused_points_are_shown_with_their_reasons(tmp_path: Path) -> None:
    results = [trial(), trial("hgrn2-vector", loss=4.1)]
    summary = summary_of(results, **OMITTED)
    files = build_report(summary, results, tmp_path)
    pages = [files.markdown.read_text(), files.html.read_text(), printed(console_table(summary, results), 200)]
    for page in pages:
        for omission in (*summary.failed, *summary.unfinished, *summary.refused):
            assert re.sub(r"\W", "", omission.name) in re.sub(r"\W", "", page)
            assert re.sub(r"\W", "", omission.reason) in re.sub(r"\W", "", page)
    assert "1 planned trial(s) have not finished and are not named" in pages[0]


def test_a_pipe_in_a_reason_does_not_end_a_table_cell(tmp_path: Path) -> None:
    results = [trial(), trial("hgrn2-vector", loss=4.1)]
    text = build_report(summary_of(results, **OMITTED), results, tmp_path).markdown.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| failed")]
    assert "NaN \\| at" in line and len(re.findall(r"(?<!\\)\|", line)) == 4


def test_markup_in_the_question_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    summary = summary_of([trial()], question="Is <script>alert(1)</script> [red]a[/red] *better* decay?")
    files = build_report(summary, [trial()], tmp_path)
    assert "<script>alert" not in files.html.read_text() + files.markdown.read_text()
    assert "[red]a[/red]" in printed(console_table(summary, [trial()]), 120)


def test_a_study_without_any_result_still_has_a_report(tmp_path: Path) -> None:
    summary = summary_of([], n_trials=1, failed=[{"name": "gla-vector-nano-s42", "reason": "out of memory"}])
    files = build_report(summary, [], tmp_path)
    assert files.figures == ()
    assert "out of memory" in files.markdown.read_text() and "No trial has a result yet" in files.markdown.read_text()
    assert "out of memory" in printed(console_table(summary, []))


def test_the_table_names_the_kernels_and_counts_their_trials() -> None:
    ours, plain = "decay scan: triton (vector decay, K=64, V=64, bfloat16 on cuda)", "decay scan: chunked (scalar decay)"
    results = [trial(kernels=(ours,)), trial(seed=1, kernels=(ours, plain)), trial("gla-vector")]
    said = printed(console_table(summary_of(results), results), 120)
    assert f"{ours}: 2 trials" in said and f"{plain}: 1 trial\n" in re.sub(r" +\n", "\n", said)
    assert "scan" not in printed(console_table(summary_of([trial()]), [trial()]), 120)


def test_missing_results_are_counted_out_loud(tmp_path: Path) -> None:
    text = build_report(summary_of([], n_trials=3, n_finished=3), [trial()], tmp_path).markdown.read_text()
    assert "counts 3 finished trials, but 1 results are given" in text


def test_one_seed_says_that_there_is_no_noise_floor(tmp_path: Path) -> None:
    results = many_methods(3)
    text = build_report(summary_of(results), results, tmp_path).markdown.read_text()
    assert "no noise floor" in text and "not separated" not in text


def test_several_seeds_are_one_row_with_their_spread(tmp_path: Path) -> None:
    results = [trial(loss=loss, seed=seed) for seed, loss in ((1, 4.0), (2, 4.1), (3, 4.2))]
    results += [trial("gla-vector", loss=loss, seed=seed) for seed, loss in ((1, 4.15), (2, 4.25), (3, 4.35))]
    files = build_report(summary_of(results), results, tmp_path)
    best, other = rows_of(files)
    assert (best["seeds"], best["not_separated_from_ranks"], other["not_separated_from_ranks"]) == ("3", "2", "1")
    assert float(best["pooled_seed_sd"]) == pytest.approx(0.1, rel=1e-9)
    text = files.markdown.read_text()
    assert "4.1000 ± 0.1000" in text and "**0.1000** nats per token" in text
    assert "Not separated: 1 of 1 pair of methods" in text


def test_losses_of_trials_with_different_data_are_called_incomparable(tmp_path: Path) -> None:
    results = [trial(), trial("gla-vector", tokens=8_192_000)]
    text = build_report(summary_of(results), results, tmp_path).markdown.read_text()
    assert "differ in tokens trained on (4,096,000 to 8,192,000): their losses are not comparable" in text


def test_a_model_worse_than_token_frequencies_is_named(tmp_path: Path) -> None:
    results = [trial(), trial("none-scalar", loss=UNIGRAM + 0.5)]
    text = build_report(summary_of(results), results, tmp_path).markdown.read_text()
    assert "No better than token frequencies alone: none-scalar-nano-s42" in text.replace("\\", "")
    assert "| -0.5000 |" in text


def test_different_data_orders_of_one_seed_are_reported(tmp_path: Path) -> None:
    same, other = [trial(), trial("gla-vector")], [trial(), trial("gla-vector", order_hash="another")]
    assert "order hashes are equal" in build_report(summary_of(same), same, tmp_path / "a").markdown.read_text()
    assert "order hashes differ" in build_report(summary_of(other), other, tmp_path / "b").markdown.read_text()


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    results = many_methods(6, seeds=(1, 2)) + many_methods(3, size="micro", layers=4)
    first = build_report(summary_of(results), results, tmp_path / "a")
    second = build_report(summary_of(results), results[::-1], tmp_path / "b")
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    assert len(first.figures) == len(second.figures) == 6
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_every_picture_that_a_page_names_is_there(tmp_path: Path) -> None:
    results = many_methods(4) + many_methods(2, size="1.45B")
    files = build_report(summary_of(results), results, tmp_path)
    named = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", files.markdown.read_text()))
    assert named == {str(p.relative_to(tmp_path)) for p in files.figures}
    for picture in re.findall(r'<img src="([^"]+)"', files.html.read_text()):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_html_page_needs_no_network(tmp_path: Path) -> None:
    page = build_report(summary_of([trial()]), [trial()], tmp_path).html.read_text()
    assert re.findall(r'<script[^>]* src="([^"]+)"', page) == ["plotly.min.js"]
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000
    assert not re.search(r'(?:src|href)="https?:', page)


@pytest.mark.parametrize("layers", [1, 24])
def test_forty_methods_are_drawn_without_a_warning(tmp_path: Path, layers: int) -> None:
    results = many_methods(40, layers=layers)
    files = build_report(summary_of(results), results, tmp_path)
    assert all(p.stat().st_size > 10_000 for p in files.figures)
    assert len(rows_of(files)) == 40


@pytest.mark.parametrize("trained", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0465), (1e-30, 1 - 1e-15), ()])
def test_extreme_decays_are_drawn_without_a_warning(tmp_path: Path, trained: tuple[float, ...]) -> None:
    results = [trial("none-scalar", trained=trained, initial=trained)]
    files = build_report(summary_of(results), results, tmp_path)
    assert len(files.figures) == (3 if trained else 1)


def test_a_rebuilt_report_replaces_the_old_one_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    build_report(summary_of([trial()]), [trial()], tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    files = build_report(summary_of([trial(loss=3.5)]), [trial(loss=3.5)], tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert "3.5000" in files.markdown.read_text() and "4.2000" not in files.markdown.read_text()


def test_the_console_table_fits_eighty_columns_without_losing_digits() -> None:
    results = many_methods(5, seeds=(1, 2)) + many_methods(3, size="micro")
    text = printed(console_table(summary_of(results), results), 80)
    assert "…" not in text and "51,234" in text and "micro" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_report_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys, services.report\nprint([m for m in ('ray', 'mlflow', 'deepspeed', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
