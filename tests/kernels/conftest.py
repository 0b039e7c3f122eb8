"""Begins the scripts that the collected tests of kernels will read."""

import pytest
from interpreted import run_as_script, scripts


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        modules = {item.path: getattr(item, "module", None) for item in session.items}
        scripts.begin(path for path, module in modules.items() if getattr(module, "run_as_script", None) is run_as_script)


def pytest_sessionfinish() -> None:
    scripts.end()
