"""The table of docs/reliability.md from the rows that the fault tests wrote: python tests/faults/table.py faults.jsonl"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

HEAD = "| fault | fired | passed | recovery s, p50 | p95 | steps repeated | silent failures |\n|---|---|---|---|---|---|---|"


def table(rows: list[dict[str, Any]]) -> str:
    """One line a fault, over all rows of it. Recovery: from the fault to the next attempt that stands where it goes on."""
    lines = [HEAD]
    for fault in sorted({row["fault"] for row in rows}, key=lambda name: int(name[1:])):
        own = [row for row in rows if row["fault"] == fault]
        seconds = sorted(value for row in own for value in row["seconds"])
        steps = [value for row in own for value in row["repeated"]]
        p50 = f"{statistics.median(seconds):.1f}" if seconds else ""
        p95 = f"{seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]:.1f}" if seconds else ""
        said = f"{sum(steps)} in {len(steps)}" if steps else ""
        fired, passed, silent = (sum(row[key] for row in own) for key in ("fired", "passed", "silent"))
        lines.append(f"| {fault} | {fired} | {passed} | {p50} | {p95} | {said} | {silent} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
