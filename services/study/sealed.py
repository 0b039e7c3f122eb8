"""JSON that knows its own digest: a record that was cut, edited or lost a bit is refused instead of believed.

Surprising: a record without a digest is taken as it is, because releases before this one wrote none; nothing that is written
today lacks it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from services.study.storage import canonical_json

KEY = "sha256"


def seal(body: dict[str, Any]) -> bytes:
    """`body` as canonical JSON, with the SHA-256 of what it would be without it."""
    return canonical_json({**body, KEY: _digest(body)}).encode()


def unseal(raw: bytes) -> dict[str, Any]:
    """What `seal` was given. Raises ValueError or TypeError for anything else but a record without a digest."""
    values = json.loads(raw)
    if not isinstance(values, dict):
        raise TypeError("it is no record")
    if KEY not in values:
        return values
    written = values.pop(KEY)
    if written != _digest(values):
        raise ValueError("its content is not what was written")
    return values


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()
