"""Every test works in its own folder, away from a user's caches, clusters and trackers."""

import os
import secrets
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # two cores, several processes: more threads only wait for each other
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
def process_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that a test starts: the checkout, no user settings, a Ray token of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "DECAY_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    token = tmp_path_factory.mktemp("ray-token") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    return {
        **kept,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
