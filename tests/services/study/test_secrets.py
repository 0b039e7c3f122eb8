"""What of an address may be shown."""

import pytest

from services.study.secrets import first_line, without_password


@pytest.mark.parametrize(
    "text, shown",
    [
        ("postgresql://mlflow:hunter2@db/mlflow", "postgresql://mlflow:***@db/mlflow"),
        ("https://s3cret-token@host/path", "https://***@host/path"),
        ("https://user:pw@one and http://user:pw@two", "https://user:***@one and http://user:***@two"),
        ("sqlite:////shared/mlflow.db", "sqlite:////shared/mlflow.db"),
        ("http://127.0.0.1:5000 asked by a@b.org", "http://127.0.0.1:5000 asked by a@b.org"),
    ],
)
def test_passwords_and_tokens_are_not_shown_and_nothing_else_is_lost(text, shown):
    assert without_password(text) == shown


def test_an_errors_first_line_is_its_own_words_or_its_name():
    assert first_line(OSError("\nhttps://u:pw@host is away\nand more")) == "https://u:***@host is away"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
