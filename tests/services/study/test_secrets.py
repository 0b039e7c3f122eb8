"""What of an address may be shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.study.ledger import Ledger
from services.study.secrets import first_line, without_password
from services.study.storage import Storage, StorageError


@pytest.mark.parametrize(
    "text, shown",
    [
        ("postgresql://mlflow:hunter2@db/mlflow", "postgresql://mlflow:***@db/mlflow"),
        ("https://s3cret-token@host/path", "https://***@host/path"),
        ("https://user:pw@one and HTTP://user:pw@two", "https://***@one and HTTP://***@two"),
        ("https://s3cret-token:@host and https://s3cret-token:x-oauth-basic@host", "https://***@host and https://***@host"),
        ("postgresql://mlflow:hunter/2@db/mlflow", "postgresql://mlflow:***@db/mlflow"),
        ("redis://:hunter2@db and ftp://user:@db", "redis://:***@db and ftp://user:***@db"),
        ("sqlite:////shared/mlflow.db", "sqlite:////shared/mlflow.db"),
        ("http://127.0.0.1:5000 asked by a@b.org", "http://127.0.0.1:5000 asked by a@b.org"),
    ],
)
def test_passwords_and_tokens_are_not_shown_and_nothing_else_is_lost(text, shown):
    assert without_password(text) == shown


def test_an_errors_first_line_is_its_own_words_or_its_name():
    assert first_line(OSError("\nhttps://u:pw@host is away\nand more")) == "https://***@host is away"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_storage_goes_by_its_name_without_the_password_and_works_with_it():
    storage = Storage("memory://user:hunter2@store/runs").child("study")
    storage.write("a", b"1")
    assert Storage(storage.address).read("a") == b"1"
    assert storage.root == "memory://user:***@store/runs/study"
    with pytest.raises(StorageError) as refused:
        storage.read("../a")
    assert "hunter2" not in str(refused.value)


def test_what_the_ledger_is_told_of_errors_has_no_password(tmp_path):
    storage = Storage(str(tmp_path))
    Ledger(storage).append("died", "t", cause="OSError: s3://key:hunter2@host/x is away", causes=["ftp://a:hunter2@b"])
    for path in (tmp_path / "ledger").iterdir():
        assert b"hunter2" not in path.read_bytes() and b"s3://key:***@host/x is away" in path.read_bytes()


def test_no_command_shows_the_password_of_a_storage(root: Path, process_env, tmp_path):
    study = str(root / "tune_spaces" / "smoke.yaml")
    for command in ("status", "report", "run"):
        said = subprocess.run(
            [sys.executable, "-m", "services.cli", command, study, "--storage", "memory://user:hunter2@store/runs"],
            env=process_env, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert "store/runs" in said.stdout + said.stderr
        assert "hunter2" not in said.stdout + said.stderr
