"""Kills of every kind, mixed, over small whole studies until enough have fired; then each end is compared with the quiet one.

    python tests/faults/soak.py --seed 1 --kills 200 --folder runs/soak

Kill number n is a pure function of (seed, n). A call goes on where the last one stopped: what has fired is on the disk, and a
study that is complete is compared, written down in rows.jsonl and followed by the next round. Ends with 1 at the first
difference, which is the only thing that a soak is for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from harness import PHASES, Place, differences, end_state, recovery, study_dict  # noqa: E402

STUDY = study_dict(name="soak", trials=6, steps=24, resources={"workers": 1, "zero_stage": 0, "max_concurrent_trials": 1,
                                                               "quarantine_after": 1000})  # fmt: skip
DRIVER = ("driver.runs", "driver.poll", "driver.send", "driver.finished", "driver.tracked", "driver.end")
WORKER_KILLS_A_RUN = 3


def kill(seed: int, number: int) -> dict[str, Any]:
    """Fault number `number`: mostly workers in a drawn phase, else the driver at a drawn place or after a drawn time."""
    draw = random.Random(f"{seed}-{number}")
    kind = draw.choices(("worker", "place", "time", "stop"), weights=(70, 15, 10, 5))[0]
    if kind == "worker":
        point, visit = draw.choice(PHASES), draw.randrange(1, 7)
        if point.startswith(("finish", "checkpoint", "train.log")):
            visit = draw.randrange(1, 3)
        return {"name": f"{number:04d}", "point": point, "visit": visit, "action": "kill"}
    if kind == "place":
        return {"name": f"{number:04d}", "point": draw.choice(DRIVER), "visit": draw.randrange(1, 4), "action": "kill"}
    return {"name": f"{number:04d}", "signal": "kill" if kind == "time" else "term", "after": draw.uniform(6.0, 30.0)}


def environment(folder: Path) -> dict[str, str]:
    """A clean environment with a Ray token of its own."""
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "DECAY_"))}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, **own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def disturb(place: Place, seed: int, fired: int, wanted: int) -> int:
    """One run of the study with the next kills: workers' and places' are armed together, a signal ends the group."""
    armed: list[dict[str, Any]] = []
    signalled: dict[str, Any] | None = None
    for number in range(fired, min(fired + WORKER_KILLS_A_RUN, wanted)):
        fault = kill(seed, number)
        if "signal" in fault:
            signalled = fault
            break
        armed.append(fault)
    place.plan(armed)
    driver = place.start()
    if signalled is not None:
        time.sleep(signalled["after"])
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL if signalled["signal"] == "kill" else signal.SIGTERM)
            place.note(signalled["name"], f"driver {signalled['signal']}", f"{signalled['after']:.1f} s after its start")
    code = driver.wait(timeout=900)
    assert code in (0, 3, -signal.SIGKILL), f"exit code {code}:\n{place.log()[-3000:]}"
    return code


def soak(seed: int, kills: int, folder: Path) -> int:
    """Runs rounds until `kills` have fired since the seed's first; returns the exit code."""
    folder = folder.absolute() / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    quiet = Place(folder=folder / "quiet", env=environment(folder), study=STUDY)
    if not (quiet.root / "report" / "table.csv").exists():
        assert quiet.run().code == 0, quiet.log()
    expected = end_state(quiet)
    rows = folder / "rows.jsonl"
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    before, first = sum(row["fired"] for row in done), sum(row["used"] for row in done)
    wanted = before + kills
    while before < wanted:
        place = Place(folder=folder / f"round-{len(done)}", env=environment(folder), study=STUDY)
        used = int((place.folder / "used").read_text()) if (place.folder / "used").exists() else 0
        while True:
            # a kill that this run did not reach is spent all the same: its number is never used again
            code = disturb(place, seed, first + used, first + used + (WORKER_KILLS_A_RUN if before < wanted else 0))
            used += WORKER_KILLS_A_RUN
            (place.folder / "used").write_text(str(used))
            print(f"round {len(done)}: {len(place.fired())} fired, exit code {code}", flush=True)
            if code == 0:
                break
        wrong = differences(expected, end_state(place))
        fired, recovered = place.fired(), recovery(place)
        row = {"fault": "F16", "test": f"seed {seed} round {len(done)}", "asked": len(fired), "fired": len(fired), "used": used,
               "passed": 0 if wrong else len(fired), "silent": len(fired) if wrong else 0,
               "phases": [record["point"] for record in fired], "seconds": [round(value, 1) for value, _ in recovered],
               "repeated": [steps for _, steps in recovered]}  # fmt: skip
        with open(rows, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        done.append(row)
        before, first = before + len(fired), first + used
        said = "DIFFERENT" if wrong else "all equal to the quiet study"
        print(f"{before} kills fired in {len(done)} rounds, {said}", flush=True)
        if wrong:
            print("\n".join(wrong[:20]))
            return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    sys.exit(soak(given.seed, given.kills, given.folder))
