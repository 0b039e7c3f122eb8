"""An attempt sleeps, is given notice, or finds the disk full, on real processes: what is saved stays whole (F4, F8, F11)."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def everything(folder):
    """Content of every file of a study, locks and what killed writers left aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock" and ".tmp-" not in str(path)
    }


def wait_until_stopped(process, record):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        if record.exists() and "T (stopped)" in Path(f"/proc/{process.pid}/status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the attempt was to stand still and did not")


@pytest.mark.parametrize(
    "point, step",
    [("checkpoint.commit", 8), pytest.param("train.log", 6, marks=pytest.mark.faults),
     pytest.param("finish.result", None, marks=pytest.mark.faults)],
)  # fmt: skip
def test_an_attempt_that_wakes_after_its_successor_ended_writes_nothing(launch, train, tmp_path, point, step):
    where = {} if step is None else {"step": step}
    (zombie,) = launch({"name": "study"}, faults=[{"name": "sleep", "point": point, "where": where, "action": "stop"}])
    wait_until_stopped(zombie, tmp_path / "faults.json.fired" / "sleep.0.json")
    successor, quiet = train({"name": "study"}, {"name": "quiet"})
    assert successor.result["weights_sha256"] == quiet.result["weights_sha256"]
    left = everything(tmp_path / "study")
    zombie.send_signal(signal.SIGCONT)
    said, errors = zombie.communicate(timeout=60)
    assert "FAILED" in said and "Fenced: this attempt of trial trial was replaced by another; stopping" in said, errors
    assert everything(tmp_path / "study") == left


def test_steps_go_on_while_a_checkpoint_is_written_and_a_kill_then_loses_only_that_one(launch, train, tmp_path):
    slow = {"name": "slow", "point": "checkpoint.write", "where": {"step": 8, "rank": 1}, "action": "slow", "seconds": 300}
    kill = {"name": "kill", "point": "train.forward", "where": {"step": 11, "rank": 0}, "action": "kill"}
    ranks = launch({"name": "behind", "workers": 2}, faults=[slow, kill])
    said = ranks[0].communicate(timeout=120)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == -signal.SIGKILL, said
    assert (tmp_path / "faults.json.fired" / "slow.0.json").exists()
    left = sorted(path.name for path in (tmp_path / "behind" / "trials" / "trial" / "checkpoints").iterdir())
    assert [name.partition(".tmp-")[0] for name in left] == ["step_00000004", "step_00000008"] and ".tmp-" in left[1]
    train({"name": "behind", "workers": 2})
    assert [attempt["from_step"] for attempt in events(tmp_path / "behind", "attempt")] == [0, 4]


def events(folder, kind):
    found = [json.loads(path.read_bytes()) for path in sorted((folder / "ledger").iterdir())]
    return [event["details"] for event in found if event["kind"] == kind]


@pytest.mark.faults
def test_a_notice_is_answered_by_a_checkpoint_and_one_that_nobody_acts_on_expires(launch, train, tmp_path):
    notice = tmp_path / "notice"
    pause = [{"name": "pause", "point": "train.forward", "where": {"step": 6}, "action": "slow", "seconds": 3}]
    ranks = launch({"name": "told", "workers": 2}, faults=pause, env={"DECAY_NOTICE_FILE": str(notice)})
    record = tmp_path / "faults.json.fired" / "pause.0.json"
    while not record.exists():
        assert ranks[0].poll() is None, ranks[0].communicate()
        time.sleep(0.05)
    notice.write_text('{"action": "terminate"}')
    begun = time.monotonic()
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert time.monotonic() - begun < 30
    assert all("Preempted: " in words for words in said)
    (preempted,) = events(tmp_path / "told", "preempted")
    assert preempted["step"] in range(6, 12) and str(notice) in preempted["reason"]
    assert (tmp_path / "told" / "trials" / "trial" / "checkpoints" / f"step_{preempted['step']:08d}").exists()
    an_hour_ago = time.time() - 3600
    os.utime(notice, (an_hour_ago, an_hour_ago))
    ignored = {"DECAY_NOTICE_FILE": str(notice)}
    resumed, quiet = train({"name": "told", "workers": 2}, {"name": "quiet", "workers": 2}, env=ignored)
    assert [attempt["from_step"] for attempt in events(tmp_path / "told", "attempt")] == [0, preempted["step"]]
    assert resumed.result["weights_sha256"] == quiet.result["weights_sha256"]
    assert resumed.losses == quiet.losses


@pytest.mark.faults
@pytest.mark.parametrize("action, said", [("no-space", "No space left on device"), ("io-error", "Input/output error")])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fails_at_a_checkpoint_is_one_line_and_the_one_before_is_gone_on_from(
    train, tmp_path, action, said, workers
):
    where = {"step": 8, "rank": workers - 1}  # what stops the writer of one rank ends all ranks in the same words
    fault = {"name": "disk", "point": "checkpoint.write", "where": where, "action": action}
    (failed,) = train({"name": "disk", "workers": workers}, faults=[fault])
    assert f"{said} at disk below {tmp_path}/disk; what was saved before is kept: mend it and run again" in failed.reason
    assert not list((failed.folder / "checkpoints").glob("*.tmp-*"))
    resumed, quiet = train({"name": "disk", "workers": workers}, {"name": "quiet", "workers": workers})
    assert [attempt["from_step"] for attempt in events(tmp_path / "disk", "attempt")] == [0, 4]
    assert resumed.result["weights_sha256"] == quiet.result["weights_sha256"]


def test_a_disk_that_is_really_full_is_one_line_and_leaves_the_last_checkpoint(train, tmp_path):
    """A file system that holds one checkpoint, where the kernel lets us mount one."""
    place = tmp_path / "full"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        (failed,) = train({"name": "full", "recipe": {"checkpoint_every": 1}})
        assert "what was saved before is kept: mend it and run again" in failed.reason
        whole = sorted(path.name for path in (failed.folder / "checkpoints").iterdir() if ".tmp" not in path.name)
        assert whole
    finally:
        subprocess.run(["umount", place], check=True)
