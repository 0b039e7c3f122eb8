"""A small valid study, as a value and as a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_study import merged

from services.study.file import Study
from services.study.storage import Storage


@pytest.fixture
def study() -> Callable[..., Study]:
    """study(**changes): the small study with changes laid over it."""
    return lambda **changes: Study.model_validate(merged(changes))


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """write_study(**changes): the same as a file."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(merged(changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty folder of a study."""
    return Storage(str(tmp_path / "small"))
