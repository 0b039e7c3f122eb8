"""One driver per study: a living holder is respected, a dead one is not, and whoever lost the lease is told."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from services.study import lease as lease_module
from services.study.lease import EXPIRY_S, NAME, LeaseHeld, take
from services.study.storage import Storage

HOLD = """
import sys, time
from services.study.lease import take
from services.study.storage import Storage
lease = take(Storage(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""

RACE = """
import multiprocessing, sys
from services.study.lease import LeaseHeld, take
from services.study.storage import Storage

def runner(start, end, results):
    storage = Storage(sys.argv[1])
    start.wait()
    try:
        take(storage)
        results.put("won")
    except LeaseHeld:
        results.put("refused")
    end.wait()

context = multiprocessing.get_context("fork")
start, end, results = context.Barrier(8), context.Barrier(8), context.SimpleQueue()
children = [context.Process(target=runner, args=(start, end, results)) for _ in range(8)]
for child in children:
    child.start()
print(" ".join(sorted(results.get() for _ in children)))
for child in children:
    child.join()
"""


@pytest.fixture
def holder(storage, process_env):
    """A living process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.root], env=process_env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait(timeout=30)
    process.stdout.close()


def left_by(storage, **changes):
    """A lease file as a holder would have left it, changed."""
    me = psutil.Process()
    body = {
        "token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": me.pid, "process_started": me.create_time(),
        "renewed": time.time(), **changes,
    }  # fmt: skip
    storage.write(NAME, json.dumps(body).encode())


def refused(storage):
    before = storage.read(NAME)
    with pytest.raises(LeaseHeld) as caught:
        take(storage)
    assert storage.read(NAME) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_second_taker_is_refused_while_the_first_lives_and_takes_over_once_it_is_killed(storage, holder):
    said = refused(storage)
    assert f"is being run by process {holder.pid} on {socket.gethostname()}" in said
    assert "wait for it, or stop it and run again" in said
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=30)
    started = time.monotonic()
    take(storage).release()
    assert time.monotonic() - started < 5 < EXPIRY_S


def test_a_killed_holder_that_its_parent_has_not_yet_collected_is_dead(storage, holder):
    holder.send_signal(signal.SIGKILL)
    while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    take(storage).release()


def test_a_released_lease_is_free_and_its_file_is_gone(storage):
    take(storage).release()
    assert storage.read(NAME) is None
    take(storage).release()


def test_releasing_twice_does_not_release_the_next_holder(storage):
    first = take(storage)
    first.release()
    take(storage)
    first.release()
    refused(storage)


def test_a_process_id_used_again_by_another_process_is_not_the_holder(storage):
    left_by(storage, process_started=psutil.Process().create_time() - 100)
    take(storage)
    left_by(storage)
    refused(storage)


def test_the_age_of_a_living_process_of_this_host_does_not_matter(storage):
    left_by(storage, renewed=time.time() - 10 * EXPIRY_S)
    refused(storage)


def test_a_holder_on_another_host_is_respected_until_it_expires(storage):
    left_by(storage, host="elsewhere", renewed=time.time() - EXPIRY_S + 5)
    assert "on elsewhere (heard of 5" in refused(storage)
    left_by(storage, host="elsewhere", renewed=time.time() - lease_module.SKEW_S - 1)
    take(storage)


def test_a_holder_that_lost_the_lease_is_told_at_its_next_renewal(storage, monkeypatch):
    lost = take(storage)
    lost.renew()
    left_by(storage, host="elsewhere")
    stolen = storage.read(NAME)
    monkeypatch.setattr(lease_module, "RENEW_S", 0.0)
    with pytest.raises(LeaseHeld, match="taken for dead and another took over the study; stopping"):
        lost.renew()
    lost.release()
    assert storage.read(NAME) == stolen


def test_a_lease_whose_file_vanished_is_lost(storage, monkeypatch):
    lost = take(storage)
    storage.delete(NAME)
    monkeypatch.setattr(lease_module, "RENEW_S", 0.0)
    with pytest.raises(LeaseHeld):
        lost.renew()


def test_renewing_says_that_the_holder_lives_but_not_more_often_than_needed(storage, monkeypatch):
    lease = take(storage)
    first = json.loads(storage.read(NAME))
    lease.renew()
    assert json.loads(storage.read(NAME)) == first
    monkeypatch.setattr(lease_module, "RENEW_S", 0.0)
    time.sleep(0.01)
    lease.renew()
    second = json.loads(storage.read(NAME))
    assert second["renewed"] > first["renewed"] and second["token"] == first["token"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"token": 1}', b'{"host": "elsewhere"}',
     b'{"host": "elsewhere", "renewed": "soon"}', b'{"host": "elsewhere", "renewed": null}',
     b'{"host": "elsewhere", "renewed": 1e30}', b'{"host": "elsewhere", "renewed": NaN}'],
)  # fmt: skip
def test_a_damaged_lease_does_not_block_for_ever(storage, content):
    storage.write(NAME, content)
    take(storage)
    refused(storage)


@pytest.mark.parametrize(
    "changes", [{"pid": None}, {"pid": "x"}, {"pid": -1}, {"pid": 10**30}, {"process_started": None}, {"pid": []}]
)
def test_a_lease_of_this_host_that_names_no_process_does_not_block(storage, changes):
    left_by(storage, **changes)
    take(storage)
    refused(storage)


def test_of_eight_processes_that_take_at_once_one_wins(storage, process_env):
    for _ in range(3):
        storage.delete(NAME)
        raced = subprocess.run(
            [sys.executable, "-c", RACE, storage.root], env=process_env, capture_output=True, text=True, timeout=120
        )
        assert raced.stdout.split() == ["refused"] * 7 + ["won"], raced.stderr


def test_of_eight_heirs_of_a_dead_holder_one_wins(storage, process_env):
    left_by(storage, host="elsewhere", renewed=0)
    raced = subprocess.run(
        [sys.executable, "-c", RACE, storage.root], env=process_env, capture_output=True, text=True, timeout=120
    )
    assert raced.stdout.split().count("won") == 1, raced.stderr


def test_a_lock_that_never_opens_is_a_refusal(storage, monkeypatch):
    monkeypatch.setattr(lease_module, "LOCK_S", 0.2)
    with lease_module._critical_section(storage), ThreadPoolExecutor(1) as other:
        caught = other.submit(take, storage).exception(timeout=20)
    assert isinstance(caught, LeaseHeld) and f"{storage.root}/.lease.lock has been held for 0 s" in str(caught)


def test_on_an_object_store_one_of_several_wins_and_the_next_is_refused():
    storage = Storage(f"memory://{uuid.uuid4().hex}/study")
    start = threading.Barrier(4)

    def run(_):
        start.wait()
        try:
            return take(storage)
        except LeaseHeld:
            return None

    with ThreadPoolExecutor(4) as pool:
        leases = [lease for lease in pool.map(run, range(4)) if lease]
    assert len(leases) == 1
    with pytest.raises(LeaseHeld, match=f"by process {os.getpid()}"):
        take(storage)
    leases[0].release()
    assert storage.read(NAME) is None
