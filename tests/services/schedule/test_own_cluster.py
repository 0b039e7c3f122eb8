"""A cluster that `decay run` starts for itself lets nobody in without the token, and keeps the token to its user."""

import subprocess
import sys

import pytest

from services.schedule.cluster import _lock_own_cluster

pytestmark = pytest.mark.slow

START = """
import ray
from services.schedule.cluster import connect, disconnect
connect(None, dashboard=False)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
disconnect()
"""
JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); print('let in')"


def test_a_token_that_ray_left_readable_for_all_is_closed(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a token")
    token.chmod(0o644)
    _lock_own_cluster()
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() == "a token"


@pytest.mark.faults
def test_a_cluster_of_its_own_wants_a_token_that_only_its_user_can_read(process_env, tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    env = {key: value for key, value in process_env.items() if not key.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}
    head = subprocess.Popen([sys.executable, "-c", START], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = head.stdout.readline().strip()
        assert address and token.stat().st_mode & 0o777 == 0o600

        def join(**more):
            command = [sys.executable, "-c", JOIN, address]
            done = subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=100)
            return "let in" in done.stdout

        assert join(RAY_AUTH_MODE="token")
        assert not join(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    finally:
        head.communicate("\n", timeout=60)
