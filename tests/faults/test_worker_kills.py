"""A worker is killed in every phase of its life; the study ends with the same bits, however often that happens (F1, F15)."""

import pytest
from harness import PHASES, worker_kills

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

QUICK = ("train.optimizer", "checkpoint.commit")


def test_kills_inside_the_optimizer_and_before_a_commit_change_no_bit(place, quiet, verdict):
    broken = place()
    kills = [kill for kill in worker_kills(seed=1, count=len(PHASES), steps=24) if kill["point"] in QUICK]
    broken.plan(kills)
    ended = broken.run()
    assert ended.code == 0, ended.log
    assert "Traceback" not in ended.log
    verdict("F1", broken, quiet(), asked=len(QUICK))
    assert len(broken.attempts(broken.trials[0])) == len(QUICK) + 1


@pytest.mark.faults
@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("backend", ["warm", "train"])
def test_kills_in_every_phase_change_no_bit(backend, seed, place, quiet, verdict):
    broken = place(resources={"backend": backend})
    broken.plan(worker_kills(seed=seed, count=len(PHASES), steps=24))
    broken.run_until_complete(most=3)
    verdict("F1", broken, quiet(), asked=len(PHASES))
