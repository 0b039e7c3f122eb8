"""What a submitted job runs. That a cluster runs it is tested with a cluster, in test_study_runs.py."""

import io

import pytest

from services.schedule import submit
from services.schedule.submit import submit_study


@pytest.mark.parametrize("options", [[], ["--accept-drift", "--retry-quarantined"]])
def test_a_job_runs_the_study_with_the_options_that_were_given(options, monkeypatch, root):
    taken = {}

    class Client:
        def __init__(self, address):
            taken["address"] = address

        def submit_job(self, **job):
            taken.update(job)
            return "job-1"

    monkeypatch.setattr(submit, "JobSubmissionClient", Client)
    said = io.StringIO()
    assert submit_study(root / "tune_spaces" / "smoke.yaml", "/shared/runs", "http://head:8265", False, said, options) == 0
    words = ["python", "-m", "services.cli", "run", "tune_spaces/smoke.yaml", "--storage", "/shared/runs", *options]
    assert taken["entrypoint"].split() == words and taken["address"] == "http://head:8265"
    assert "ray job logs job-1 --address http://head:8265" in said.getvalue()
