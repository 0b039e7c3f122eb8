"""The driver is killed at the places where its records disagree, and at random times: runs = trials, each step once (F2)."""

import random
import signal
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

PLACES = ("driver.runs", "driver.poll", "driver.send", "driver.finished", "driver.tracked", "driver.end")
KILLS = 20


def kill_at(*places):
    return [{"name": f"{number}-{place}", "point": place, "action": "kill"} for number, place in enumerate(places)]


def finished_trials_stayed_finished(place):
    done = set()
    for event in place.events():
        assert not (event.kind == "attempt" and event.trial in done), f"{event.trial} was started after it had finished"
        done |= {event.trial} if event.kind == "finished" else set()
    return done == set(place.trials)


def test_a_driver_killed_between_two_records_leaves_one_run_a_trial_and_each_step_once(place, quiet, verdict):
    broken = place()
    broken.plan(kill_at("driver.send"))
    ended = broken.run_until_complete(most=2)
    assert [one.code for one in ended] == [-signal.SIGKILL, 0]
    assert finished_trials_stayed_finished(broken)
    verdict("F2", broken, quiet(), asked=1)


@pytest.mark.faults
def test_a_driver_killed_at_every_place_of_its_life_changes_nothing(place, quiet, verdict):
    broken = place(trials=2)
    broken.plan(kill_at(*PLACES))
    broken.run_until_complete(most=len(PLACES) + 1)
    assert finished_trials_stayed_finished(broken)
    verdict("F2", broken, quiet(trials=2), asked=len(PLACES))


@pytest.mark.faults
def test_a_study_whose_driver_is_killed_twenty_times_ends_as_if_nothing_had_happened(place, quiet, verdict):
    draw = random.Random(20)
    how = {"trials": 3, "steps": 240, "recipe": {"checkpoint_every": 20, "eval_every": 40, "telemetry_every": 40}}
    broken = place(**how)
    broken.plan([])
    for number in range(KILLS):
        driver = broken.start()
        seconds = draw.uniform(4.0, 26.0)  # a driver trains after about 12 s on two cores
        time.sleep(seconds)
        alive = driver.poll() is None
        driver.kill()
        driver.wait()
        assert alive, f"the study was complete before kill {number}: it is too short for {KILLS} kills"
        broken.note(f"{number:02d}-random", "driver", f"{seconds:.1f} s after its start")
    broken.run_until_complete(most=1)
    assert finished_trials_stayed_finished(broken)
    verdict("F2", broken, quiet(**how), asked=KILLS)
