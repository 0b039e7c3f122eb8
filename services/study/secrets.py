"""Passwords that people put into addresses are not for logs, manifests or reports."""

from __future__ import annotations

import logging
import re

_PASSWORD = re.compile(r"(://[^/\s:@]*):\S*@")
_USER_INFO = re.compile(r"(https?://)[^/\s]+@", re.IGNORECASE)  # a token stands in either place


def without_password(text: str) -> str:
    """`text` with *** for the password of every address in it (scheme://user:password@host), and for all that stands before
    the host of a web address."""
    return _PASSWORD.sub(r"\1:***@", _USER_INFO.sub(r"\1***@", text))


class WithoutPasswords(logging.Formatter):
    """Log lines, tracebacks included, with the passwords of addresses masked."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return without_password(super().format(record))


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its name; without passwords."""
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[0][:300])
