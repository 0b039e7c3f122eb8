"""Clocks of two hosts that disagree or jump, and heartbeats that stall, in virtual time: no false death, no immortal (F12)."""

import pytest

from services.study import lease as module
from services.study.lease import EXPIRY_S, RENEW_S, Clock, LeaseHeld, take

OFFSETS = (-7200.0, -EXPIRY_S - 1, -20.0, 0.0, 20.0, EXPIRY_S + 1, 7200.0)


class Hosts:
    """Two hosts in one virtual time: the holder's heart beats while the taker sleeps. `ahead` is the error of its clock."""

    def __init__(self, storage, monkeypatch, ahead):
        self.now, self.ahead, self.here, self.beating, self.jumps = 0.0, ahead, "holder", True, {}
        monkeypatch.setattr(module.socket, "gethostname", lambda: self.here)
        self.storage = storage
        self.lease = take(storage, clock=self.clock(lambda: self.ahead))
        self.here = "taker"

    def clock(self, ahead):
        return Clock(wall=lambda: 1e9 + self.now + ahead(), steady=lambda: 77.0 + self.now, sleep=self.sleep)

    def sleep(self, seconds):
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            self.ahead += self.jumps.pop(round(self.now), 0.0)
            if self.beating:
                self.here = "holder"
                self.lease.renew()
                self.here = "taker"

    def try_to_take(self):
        try:
            return take(self.storage, clock=self.clock(lambda: 0.0))
        except LeaseHeld:
            return None


@pytest.mark.parametrize("ahead", OFFSETS)
def test_a_holder_that_beats_is_never_taken_for_dead_whatever_the_clocks_say(storage, monkeypatch, ahead):
    hosts = Hosts(storage, monkeypatch, ahead)
    hosts.jumps = {40: 3600.0, 90: -9000.0, 200: 5400.0}
    while hosts.now < 600:
        assert hosts.try_to_take() is None, f"a living holder lost its lease after {hosts.now:.0f} s"
        hosts.sleep(7.0)
    hosts.here = "holder"
    hosts.lease.renew()


@pytest.mark.parametrize("ahead", OFFSETS)
def test_a_holder_that_died_does_not_hold_for_ever_whatever_the_clocks_say(storage, monkeypatch, ahead):
    hosts = Hosts(storage, monkeypatch, ahead)
    hosts.sleep(100.0)
    hosts.beating, died = False, hosts.now
    while hosts.try_to_take() is None:
        hosts.sleep(5.0)
        # a clock ahead by up to EXPIRY_S is believed once it is reached; then comes one watch
        assert hosts.now - died <= 3 * EXPIRY_S + 10, "an immortal lease"
    assert hosts.now - died >= EXPIRY_S - RENEW_S, "taken before anybody could tell"


@pytest.mark.parametrize("ahead", OFFSETS)
def test_a_heartbeat_may_stall_for_less_than_the_expiry(storage, monkeypatch, ahead):
    hosts = Hosts(storage, monkeypatch, ahead)
    hosts.sleep(30.0)
    hosts.beating = False
    stalled = hosts.now
    sleep = hosts.sleep

    def beats_again_in_time(seconds):
        hosts.beating = hosts.now - stalled >= EXPIRY_S - RENEW_S - 5
        sleep(seconds)

    hosts.sleep = beats_again_in_time
    while hosts.now - stalled < 2 * EXPIRY_S:
        assert hosts.try_to_take() is None
        hosts.sleep(1.0)
