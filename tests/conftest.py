"""Every test works in its own folder, away from a user's caches, clusters and trackers."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DECAY_KERNEL"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, so that a mistake shows before Ray has started."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def process_env() -> dict[str, str]:
    """The environment of a process that a test starts: the checkout importable, no user settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "DECAY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
