"""A trial goes on with another number of ranks: the same batches, not a bit of its state lost, losses within a band (F6)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import _free_port

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("reshard_rank.py")
# Ranks add the same fp32 numbers in another order. The tests print what they measure.
REASSOCIATION_NATS = 2e-5


def ranks(process_env, mode, size, stage, folder, writers):
    """What rank 0 of `size` real processes printed."""
    port = str(_free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), mode, str(rank), str(size), str(stage), port, str(folder), str(writers)],
            env=process_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors[-2000:] for _, errors in said)
    return json.loads(said[0][0].splitlines()[-1])


@pytest.mark.faults
@pytest.mark.parametrize("stage", [1, 2, 3])  # stage 0 shards nothing
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_weights_and_moments_are_equal_bit_for_bit_on_another_number_of_ranks(process_env, tmp_path, stage, writers, readers):
    saved = ranks(process_env, "save", writers, stage, tmp_path, writers)
    loaded = ranks(process_env, "load", readers, stage, tmp_path, writers)
    assert len(saved) > 20
    assert loaded == saved


def difference(one, other):
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def test_a_trial_of_two_ranks_goes_on_with_one(train):
    how = {"zero_stage": 2, "elastic": True}
    train({"name": "shrunk", "workers": 2, **how}, kill_at=7)
    shrunk, quiet = train({"name": "shrunk", "workers": 1, **how}, {"name": "quiet", "workers": 1, **how})
    assert shrunk.result["world_sizes"] == [2, 1] and quiet.result["world_sizes"] == [1]
    assert shrunk.result["order_hash"] == quiet.result["order_hash"]
    print(f"2 -> 1 ranks against 1: largest difference {difference(shrunk, quiet):.1e} nats")
    assert difference(shrunk, quiet) <= REASSOCIATION_NATS


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_trial_of_four_ranks_goes_on_with_two_and_then_with_eight(train, stage):
    how = {"zero_stage": stage, "elastic": True}
    train({"name": "moved", "workers": 4, **how}, kill_at=6)
    train({"name": "moved", "workers": 2, **how}, kill_at=10)
    (moved,) = train({"name": "moved", "workers": 8, **how})
    (quiet,) = train({"name": "quiet", "workers": 4, **how})
    assert moved.result["world_sizes"] == [4, 2, 8]
    assert moved.result["order_hash"] == quiet.result["order_hash"]
    assert [record["step"] for record in moved.steps] == list(range(1, 13))
    print(f"ZeRO {stage}, 4 -> 2 -> 8 ranks against 4: largest difference {difference(moved, quiet):.1e} nats")
    assert difference(moved, quiet) <= REASSOCIATION_NATS
    assert moved.losses != quiet.losses, "equal losses on other ranks: were they other ranks at all?"
