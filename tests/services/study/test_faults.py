"""Fault points are where their list says, fire once with a record, and cost nothing in a process that asked for none."""

import json
import re
import signal
import subprocess
import sys

import pytest

from services.study import faults

USE = """
import sys
from services.study import faults
for step in range(5):
    faults.point("train.data", rank=0, step=step)
    print(step, flush=True)
"""


def run(process_env, plan=None):
    env = {**process_env, **({faults.VARIABLE: str(plan)} if plan else {})}
    done = subprocess.run([sys.executable, "-c", USE], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.split(), done.stderr


def test_the_code_has_exactly_the_points_that_are_listed(root):
    found = []
    for path in (root / "services").rglob("*.py"):
        found += re.findall(r'faults\.point\(\s*"([a-z.-]+)"', path.read_text())
    assert sorted(found) == sorted(set(faults.POINTS)), "a point stands once, and every listed point stands somewhere"


def test_a_fault_fires_once_where_it_is_asked_for_and_leaves_a_record(process_env, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"name": "k", "point": "train.data", "where": {"step": 3}, "action": "kill"}]))
    code, steps, _ = run(process_env, plan)
    assert (code, steps) == (-signal.SIGKILL, ["0", "1", "2"])
    record = json.loads((tmp_path / "plan.json.fired" / "k.0.json").read_text())
    assert (record["point"], record["where"]) == ("train.data", {"rank": 0, "step": 3})
    assert run(process_env, plan)[:2] == (0, list("01234"))


def test_a_fault_waits_for_its_visit_and_fires_as_often_as_it_may(process_env, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"name": "f", "point": "train.data", "visit": 2, "times": 2, "action": "fail"}]))
    for _ in range(2):
        code, steps, said = run(process_env, plan)
        assert (code, steps) == (1, ["0"]) and "fault f at train.data" in said
    assert run(process_env, plan)[0] == 0


@pytest.mark.parametrize("wrong", [{"point": "train.lunch"}, {"action": "sing"}, {"vist": 2}])
def test_a_fault_that_does_not_exist_is_refused_rather_than_never_fired(process_env, tmp_path, wrong):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"name": "f", "point": "train.data", "action": "fail", **wrong}]))
    code, _, said = run(process_env, plan)
    assert code == 1 and "no such fault" in said


def test_without_a_plan_nothing_happens(process_env):
    assert run(process_env)[:2] == (0, list("01234"))
    assert not faults.armed()
