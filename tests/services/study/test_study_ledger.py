"""The ledger loses nothing, names what is damaged, and never takes back that a trial finished."""

import subprocess
import sys

import pytest

from services.study.ledger import Event, Ledger, TrialState
from services.study.storage import StorageError

APPEND = """
import os, sys
from services.study.ledger import Ledger
from services.study.storage import Storage
children = []
for writer in range(6):
    if os.fork() == 0:
        ledger = Ledger(Storage(sys.argv[1]))
        for number in range(25):
            ledger.append("attempt", f"trial{writer}", number=number, writer=writer)
        os._exit(0)
    children.append(writer)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in children]
sys.exit(max(codes))
"""


@pytest.fixture
def ledger(storage):
    return Ledger(storage)


def test_an_event_is_read_back_by_another_reader(ledger, storage):
    written = ledger.append("attempt", "a", processes=["host:1"], from_step=3)
    assert Ledger(storage).events() == [written]
    assert (written.kind, written.trial, written.details) == ("attempt", "a", {"processes": ["host:1"], "from_step": 3})


def test_events_of_several_processes_at_once_are_all_there(storage, process_env):
    writers = subprocess.Popen([sys.executable, "-c", APPEND, storage.root], env=process_env)
    reader = Ledger(storage)
    while writers.poll() is None:
        reader.events()  # never a part of an event, however often it is read meanwhile
    assert writers.returncode == 0
    events = reader.events()
    assert {(e.details["writer"], e.details["number"]) for e in events} == {(w, n) for w in range(6) for n in range(25)}
    assert len(events) == 150
    assert [e.time_ns for e in events] == sorted(e.time_ns for e in events)
    assert all(state.attempts == 25 for state in reader.states(f"trial{w}" for w in range(6)).values())


def test_a_reader_sees_what_others_append_later(ledger, storage):
    reader = Ledger(storage)
    for count in range(1, 4):
        ledger.append("run")
        assert len(reader.events()) == count


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"word"', b'{"kind": "attempt"}', b"\xff\xfe",
     b'{"kind":"banana","trial":"a","time_ns":1,"details":{}}',
     b'{"kind":"attempt","trial":1,"time_ns":1,"details":{}}',
     b'{"kind":"attempt","trial":"a","time_ns":"1","details":{}}',
     b'{"kind":"attempt","trial":"a","time_ns":1,"details":[]}',
     b'{"kind":"attempt","trial":"a","time_ns":1,"details":{},"more":1}'],
)  # fmt: skip
def test_a_damaged_event_is_named(ledger, storage, content):
    ledger.append("attempt", "a")
    storage.write("ledger/00000000000000000001-damaged.json", content)
    with pytest.raises(StorageError) as caught:
        Ledger(storage).states(["a"])
    assert f"{storage.root}/ledger/00000000000000000001-damaged.json is damaged" in str(caught.value)
    assert str(caught.value).endswith("move it away to run its trial again") and "\n" not in str(caught.value)


def test_what_a_killed_writer_left_is_no_event(ledger, storage):
    ledger.append("run")
    storage.write("ledger/.00000000000000000001-half.json.1234abcd.tmp", b'{"kind": "att')
    assert len(Ledger(storage).events()) == 1


@pytest.mark.parametrize(
    "kinds, state",
    [
        ([], TrialState(state="waiting")),
        (["attempt"], TrialState(state="started", attempts=1)),
        (["attempt", "attempt", "attempt"], TrialState(state="started", attempts=3)),
        (["attempt", "failed"], TrialState(state="failed", attempts=1, reason="because")),
        (["attempt", "failed", "attempt"], TrialState(state="started", attempts=2)),
        (["attempt", "finished"], TrialState(state="finished", attempts=1)),
        (["attempt", "finished", "failed"], TrialState(state="finished", attempts=1)),
        (["attempt", "finished", "attempt"], TrialState(state="finished", attempts=2)),
        (["attempt", "finished", "tracked", "failed"], TrialState(state="finished", attempts=1, tracked=True)),
    ],
)
def test_a_trial_is_where_its_events_say_and_finished_stays_finished(ledger, kinds, state):
    for kind in kinds:
        ledger.append(kind, "a", **({"reason": "because"} if kind == "failed" else {}))
        ledger.append("failed", "another")
    ledger.append("run")
    assert ledger.states(["a"]) == {"a": state}


def test_a_reopened_trial_has_nothing_of_what_it_had_and_can_finish_again(ledger):
    ledger.append("finished", "t", result_sha256="a", steps_sha256="b")
    ledger.append("tracked", "t", uri="store")
    ledger.append("reopened", "t")
    state = ledger.states(["t"])["t"]
    assert (state.state, state.tracked, state.tracked_in) == ("started", False, "")
    assert (state.result_sha256, state.steps_sha256) == ("", "")
    ledger.append("finished", "t", result_sha256="c", steps_sha256="d")
    state = ledger.states(["t"])["t"]
    assert (state.state, state.result_sha256, state.tracked) == ("finished", "c", False)


def test_a_trial_nobody_asks_for_is_not_reported(ledger):
    ledger.append("finished", "a")
    assert ledger.states(["b"]) == {"b": TrialState(state="waiting")}


def test_an_event_is_what_its_file_says(storage):
    storage.write("ledger/x.json", b'{"kind":"finished","trial":"a","time_ns":7,"details":{"held_out_loss":2.5}}')
    assert Ledger(storage).events() == [Event(kind="finished", trial="a", time_ns=7, details={"held_out_loss": 2.5})]
