"""One real SQLite MLflow store for all tests (making one takes seconds), a study of its own for each."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from services.study.storage import Storage
from services.track.runs import Tracker

_number = itertools.count()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of the store."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def name() -> str:
    """A study name that no other test has."""
    return f"study-{next(_number)}"


@pytest.fixture
def open_tracker(store: str, name: str, tmp_path: Path) -> Callable[[], Tracker]:
    """open_tracker(): what a driver of this test's study does at its start."""

    def connect() -> Tracker:
        tracker = Tracker(store, tmp_path / "artifacts")
        tracker.open_study(name, "which?")
        return tracker

    return connect


@pytest.fixture
def tracker(open_tracker: Callable[[], Tracker]) -> Tracker:
    """The first driver's tracker."""
    return open_tracker()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """The study's folder."""
    return Storage(str(tmp_path / "study"))
