"""A writer that was replaced is told so before it commits anything, whichever way its successor came."""

import subprocess
import sys
import threading

import pytest
from filelock import Timeout

from services.study import fence as module
from services.study.fence import Fence, Fenced, claim, driver_number, next_driver
from services.study.lease import take
from services.study.ledger import Ledger
from services.study.sealed import seal, unseal
from services.study.storage import StorageError

HOLD = """
import os, signal, sys
from services.study.fence import claim
from services.study.storage import Storage
with claim(Storage(sys.argv[1]), 0, "t").held():
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_newer_driver_fences_the_older_one_and_its_attempts(storage):
    first = next_driver(storage, 0)
    attempt = claim(storage, first, "t")
    old = Fence(storage=storage, driver=first)
    for fence in (attempt, old):
        fence.check()
    assert next_driver(storage, 0) == first + 1
    for fence in (attempt, old):
        with pytest.raises(Fenced, match="driver 1 was replaced by driver 2"):
            fence.check()
    with pytest.raises(Fenced):
        claim(storage, first, "t")
    with pytest.raises(Fenced):
        Ledger(storage, old).append("run")
    assert Ledger(storage).events() == []


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"driver": 9, "sha256": "0"}'])
def test_where_the_number_is_lost_a_driver_and_its_attempts_stop_instead_of_writing(storage, content):
    driver = next_driver(storage, 0)
    attempt = claim(storage, driver, "t")
    storage.delete(module.NAME) if content is None else storage.write(module.NAME, content)
    for fence in (attempt, Fence(storage=storage, driver=driver)):
        with pytest.raises(Fenced, match=r"fence.json is lost or damaged: driver 1 may have been replaced"), fence.held():
            raise AssertionError("a driver that may have been replaced came in")
    assert next_driver(storage, driver) == 2
    Fence(storage=storage, driver=2).check()


def test_a_lock_that_cannot_be_had_is_one_line(storage, monkeypatch):
    class Held:
        def __init__(self, path, timeout):
            self.path = path

        def acquire(self):
            raise Timeout(str(self.path))

    monkeypatch.setattr(module, "FileLock", Held)
    with pytest.raises(StorageError) as refused, Fence(storage=storage, driver=0).held():
        raise AssertionError("somebody else has the lock")
    assert len(str(refused.value).splitlines()) == 1 and ".fence.lock has been held for twice 10 s; end the process" in str(
        refused.value
    )


def test_a_newer_attempt_fences_the_older_one_of_its_trial_alone(storage):
    one, other = claim(storage, 0, "t"), claim(storage, 0, "u")
    newer = claim(storage, 0, "t")
    for fence in (newer, other):
        fence.check()
    with pytest.raises(Fenced, match="attempt of trial t was replaced"), one.held():
        raise AssertionError("a fenced writer came in")


def test_each_lease_brings_a_higher_number_even_when_the_file_is_lost(storage):
    first = take(storage)
    first.release()
    storage.delete(module.NAME)
    second = take(storage, at_least=first.driver)
    assert (first.driver, second.driver) == (1, 2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"driver": "x"}', b'{"driver": 9, "sha256": "0"}'])
def test_a_damaged_number_is_written_anew(storage, content):
    storage.write(module.NAME, content)
    assert driver_number(storage) == 0
    assert next_driver(storage, 4) == 5


def test_a_damaged_token_ends_the_attempt_and_the_next_one_goes_on(storage):
    attempt = claim(storage, 0, "t")
    storage.write(f"trials/t/{module.NAME}", b"{")
    with pytest.raises(Fenced):
        attempt.check()
    claim(storage, 0, "t").check()


def test_a_successor_waits_for_a_commit_and_replaces_the_lock_of_one_that_stands_still(storage, process_env, monkeypatch):
    monkeypatch.setattr(module, "LOCK_S", 0.5)
    attempt, done = claim(storage, 0, "t"), []
    with attempt.held():
        successor = threading.Thread(target=lambda: done.append(claim(storage, 0, "t")))
        successor.start()
        successor.join(0.2)
        assert not done
    successor.join(10)
    assert done
    holder = subprocess.Popen([sys.executable, "-c", HOLD, storage.root], env=process_env, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        claim(storage, 0, "t").check()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_one_flipped_bit_of_a_sealed_record_is_found():
    raw = bytearray(seal({"step": 8, "hash": "ab"}))
    assert unseal(bytes(raw)) == {"step": 8, "hash": "ab"}
    for place in range(len(raw)):
        for bit in range(7):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << bit
            try:
                values = unseal(bytes(flipped))
            except (ValueError, TypeError, RecursionError):
                continue
            assert "sha256" not in values and len(values) == 3, "only a damaged name of the digest shows as a key too many"
