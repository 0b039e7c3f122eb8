"""Passwords that people put into addresses are not for logs, manifests or reports."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s]+@(?=[^/\s@]*)")


def without_password(text: str) -> str:
    """`text` with the password of every address in it (scheme://user:password@host) replaced by ***."""
    return _PASSWORD.sub(r"\1:***@", text)
