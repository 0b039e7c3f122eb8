"""Deaths at one place are counted, deaths anywhere else are not, and what is known of them goes into the record."""

import pytest

from services.study.ledger import Ledger
from services.study.outcome import digest_of, result_file, result_of
from services.study.quarantine import evidence_of, last_step
from services.study.result import UnreadableResult


def die(ledger, from_step, step, cause="boom"):
    ledger.append("attempt", "t", from_step=from_step)
    ledger.append("died", "t", from_step=from_step, last_step=step, cause=cause, processes=["host:1"])


def test_three_deaths_in_a_row_at_one_place_are_evidence(storage):
    ledger = Ledger(storage)
    for number in range(3):
        assert evidence_of(ledger, "t", 3) is None
        die(ledger, 4, 6, f"boom {number}")
    found = evidence_of(ledger, "t", 3)
    assert found["reason"] == "its workers died 3 times between step 6 and the next log: boom 2"
    assert found["causes"] == ["boom 0", "boom 1", "boom 2"] and found["from_step"] == 4
    assert len(found["times_ns"]) == len(found["processes"]) == 3
    ledger.append("quarantined", "t", **found)
    state = ledger.states(["t"])["t"]
    assert (state.state, state.deaths, state.attempts, state.reason) == ("quarantined", 3, 3, found["reason"])


@pytest.mark.parametrize("between", [lambda ledger: die(ledger, 4, 7), lambda ledger: die(ledger, 8, 12),
                                     lambda ledger: ledger.append("released", "t")])  # fmt: skip
def test_progress_another_place_or_a_persons_word_begin_the_count_anew(storage, between):
    ledger = Ledger(storage)
    die(ledger, 4, 6)
    die(ledger, 4, 6)
    between(ledger)
    die(ledger, 4, 6)
    assert evidence_of(ledger, "t", 3) is None


def test_workers_that_never_began_are_no_evidence_and_interrupt_none(storage):
    ledger = Ledger(storage)
    for _ in range(9):
        ledger.append("died", "t", from_step=None, last_step=0, cause="NCCL", processes=[])
    assert evidence_of(ledger, "t", 1) is None
    die(ledger, 4, 6)
    ledger.append("died", "t", from_step=4, last_step=6, cause="no node", processes=[])
    die(ledger, 4, 6, "again")
    found = evidence_of(ledger, "t", 2)
    assert found["causes"] == ["boom", "again"] and evidence_of(ledger, "t", 3) is None


def test_a_preemption_is_no_death_and_no_failure(storage):
    ledger = Ledger(storage)
    for _ in range(5):
        ledger.append("attempt", "t")
        ledger.append("preempted", "t", step=3)
    state = ledger.states(["t"])["t"]
    assert (state.state, state.attempts, state.preemptions, state.deaths) == ("started", 5, 5, 0)
    assert evidence_of(ledger, "t", 1) is None


def test_where_an_attempt_died_is_read_from_ledger_and_log(storage):
    ledger = Ledger(storage)
    assert last_step(ledger, storage, "t") == {"from_step": None, "last_step": 0, "processes": []}
    ledger.append("attempt", "t", from_step=4, processes=["h:1"])
    storage.write("trials/t/steps.jsonl", b'{"step":5}\n{"step":6}\n{"st')
    assert last_step(ledger, storage, "t") == {"from_step": 4, "last_step": 6, "processes": ["h:1"]}


def test_a_result_that_is_gone_or_changed_after_its_trial_finished_is_named(storage):
    ledger = Ledger(storage)
    assert result_of(storage, "t", ledger.states(["t"])["t"]) is None
    ledger.append("finished", "t", result_sha256=digest_of(b"whole"))
    state = ledger.states(["t"])["t"]
    with pytest.raises(UnreadableResult, match="is gone although the trial is finished"):
        result_of(storage, "t", state)
    storage.write(result_file("t"), b"whoLe")
    with pytest.raises(UnreadableResult, match="has other bytes than when the trial finished"):
        result_of(storage, "t", state)
