"""Test files that run themselves as scripts in Triton's interpreter, some ahead of their tests.

Whether kernels are interpreted is settled when triton is imported. So such a file is a script as well, which in a process of
its own computes all of its cases and prints one line of JSON; its tests read that. A script has one thread: those of a session
are begun when tests have been collected, so that they use the cores which the tests before theirs leave idle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

LIMIT_S = 400.0
ROOT = Path(__file__).resolve().parents[2]
Finished = tuple[int, str, str]  # exit code, what was printed, errors


class Scripts:
    """Runs scripts, as many at a time as there are cores."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._begun: dict[Path, Future[Finished]] = {}
        self._processes: list[subprocess.Popen[str]] = []
        self._over = False

    def begin(self, paths: Iterable[Path]) -> None:
        for path in map(Path.resolve, paths):
            if path not in self._begun:
                self._begun[path] = self._pool.submit(self._run, path)

    def printed(self, path: Path) -> dict[str, Any]:
        """The last line that a script printed; AssertionError with its errors if it failed."""
        self.begin([path])
        code, printed, errors = self._begun[path.resolve()].result()
        assert code == 0 and printed, errors[-3000:]
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def end(self) -> None:
        """Stops what still runs."""
        self._over = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def _run(self, path: Path) -> Finished:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", str(path)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as process:
            self._processes.append(process)
            if self._over:
                process.kill()
            try:
                printed, errors = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return 1, "", f"{path} took more than {LIMIT_S:.0f} s"
            return process.returncode, printed, errors


scripts = Scripts()


def run_as_script(path: str) -> dict[str, Any]:
    """What the test file at `path` prints as a script, run once in a session."""
    return scripts.printed(Path(path).resolve())
