"""All 39 configurations of the paper through the real service in one command: `make test-paper`, under 35 minutes."""

import csv
import math
import subprocess
import sys

import pytest

from services.study.file import read_study
from services.study.plan import make_plan
from services.train.step_log import parse

pytestmark = [pytest.mark.paper, pytest.mark.slow, pytest.mark.timeout(3600)]
CONFIGURATIONS, STEPS, ENDS = 39, 30, 5


def test_all_39_configurations_train_without_a_nan_and_learn(root, process_env, tmp_path):
    file = root / "tune_spaces" / "paper" / "nano.yaml"
    plan = make_plan(read_study(file))
    assert len(plan.trials) == len({trial.point for trial in plan.trials}) == CONFIGURATIONS
    command = [sys.executable, "-m", "services.cli", "run", str(file), "--storage", str(tmp_path)]
    done = subprocess.run(command, env=process_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / plan.study.name
    for trial in plan.trials:
        losses = [record["train/loss"] for record in parse((folder / "trials" / trial.id / "steps.jsonl").read_bytes())]
        assert len(losses) == STEPS and all(map(math.isfinite, losses)), trial.name
        first, last = sum(losses[:ENDS]) / ENDS, sum(losses[-ENDS:]) / ENDS
        print(f"{trial.name:<40} first five {first:.4f}  last five {last:.4f}")
        assert last < first, trial.name
    page = (folder / "report" / "report.md").read_text().replace("\\", "")  # Markdown escapes underscores
    assert all(trial.method in page for trial in plan.trials)
    rows = csv.DictReader((folder / "report" / "trials.csv").read_text().splitlines())
    assert {row["name"] for row in rows} == {trial.name for trial in plan.trials}
