"""Studies to break, a quiet one to compare them with, and the record of every verdict for the table in the docs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Place, differences, end_state, recovery, report, study_dict


@pytest.fixture
def place(process_env: dict[str, str], tmp_path: Path) -> Callable[..., Place]:
    """place("killed", trials=2): a small study in a folder of its own."""

    def make(folder: str = "study", **study: Any) -> Place:
        return Place(folder=tmp_path / folder, env=process_env, study=study_dict(**study))

    return make


@pytest.fixture(scope="session")
def quiet(process_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """quiet(trials=2): the end state of that study when nothing happens to it; each is run once a session."""
    known: dict[str, dict[str, Any]] = {}

    def state(**study: Any) -> dict[str, Any]:
        whole = study_dict(**study)
        key = json.dumps(whole, sort_keys=True)
        if key not in known:
            undisturbed = Place(folder=tmp_path_factory.mktemp("quiet"), env=process_env, study=whole)
            ended = undisturbed.run()
            assert ended.code == 0, ended.log
            known[key] = end_state(undisturbed)
        return known[key]

    return state


@pytest.fixture
def verdict(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """verdict("F1", place, expected): compares end states, writes one row of the table, and fails where they differ.

    A fault that did not fire is a failure. Rows go to the file that DECAY_FAULT_TABLE names, if it does.
    """

    def judge(fault: str, place: Place, expected: dict[str, Any], asked: int) -> None:
        fired = place.fired()
        wrong = differences(expected, end_state(place))
        recovered = recovery(place)
        row = {"fault": fault, "test": request.node.name, "asked": asked, "fired": len(fired),
               "passed": 0 if wrong else len(fired), "silent": len(fired) if wrong else 0,
               "phases": [record["point"] for record in fired],
               "seconds": [round(seconds, 1) for seconds, _ in recovered],
               "repeated": [steps for _, steps in recovered]}  # fmt: skip
        report(row)
        assert not wrong, "\n".join(wrong[:20])
        assert len(fired) == asked, f"{len(fired)} of {asked} faults fired: {[record['name'] for record in fired]}"

    yield judge
