"""What was measured beside what the paper prints for the same point at the same size.

The paper prints a training loss, so the training loss of the last 100 steps stands beside it and not the held-out loss that
the report ranks by.
"""

from __future__ import annotations

from services.report.seed_spread import Configuration, SizeRanking
from services.report.tables import Table

SENTENCE = (
    "The paper's loss is a training loss at the last logged steps, after 10.5 billion tokens of fineweb-edu by GPT-2's "
    "tokenizer; the training loss here is the mean of the last 100 steps. The difference means something for trials on the "
    "same data only, and the printed loss carries 0.01 to 0.02 nats of noise. decay plan lists what is known to be wrong "
    "with each row."
)


def published_table(ranking: SizeRanking) -> Table | None:
    """The configurations that the paper has a loss for, in the order of rank; None where there is none."""
    header = ("rank", "method", "train loss (last 100)", "published loss", "above published")
    rows = tuple(_row(row) for row in ranking.rows if row.published_loss is not None)
    return Table(header=header, rows=rows, numeric=frozenset(header) - {"method"}) if rows else None


def _row(row: Configuration) -> tuple[str, ...]:
    assert row.published_loss is not None and row.above_published is not None, "only linked rows are shown"
    return (str(row.rank), row.label, f"{row.train_loss:.4f}", f"{row.published_loss:.3f}", f"{row.above_published:+.4f}")
