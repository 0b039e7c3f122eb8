"""The report puts the paper's loss beside the training loss, for the points and sizes that the paper has."""

import pytest
from synthetic_study import summary_of, trial

from services.report.build_report import build_report
from services.report.csv_files import ranking_csv
from services.report.published_table import published_table
from services.report.seed_spread import rank_by_size

LINKED = trial("mamba2-vector-as_run", size="160M", loss=3.1, train_loss_last_100=2.953, published_loss=2.947)
OTHER = trial("retnet-scalar", size="160M", loss=3.0)


def test_only_rows_of_the_paper_stand_in_the_table_with_their_difference():
    (ranking,) = rank_by_size([LINKED, OTHER])
    table = published_table(ranking)
    assert table is not None
    assert table.rows == (("2", "mamba2-vector-as_run", "2.9530", "2.947", "+0.0060"),)


def test_a_study_without_such_rows_says_nothing_of_the_paper(tmp_path):
    (ranking,) = rank_by_size([OTHER])
    assert published_table(ranking) is None
    assert "Beside the paper" not in build_report(summary_of([OTHER]), [OTHER], tmp_path).markdown.read_text()


def test_page_and_csv_carry_the_published_loss(tmp_path):
    page = build_report(summary_of([LINKED, OTHER]), [LINKED, OTHER], tmp_path).markdown.read_text()
    assert "## Beside the paper, 160M" in page and "| 2.947 | +0.0060 |" in page
    header, other, linked = (line.split(",") for line in ranking_csv(rank_by_size([LINKED, OTHER])).splitlines())
    at = header.index("published_loss")
    assert other[at : at + 2] == ["", ""]
    assert [float(value) for value in linked[at : at + 2]] == pytest.approx([2.947, 0.006])
