"""A small local corpus, cut into many small batches."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from services.data import shards

WORDS = ("decay", "state", "window", "the", "of", "λ", "memory", "a\nnew line", "gate", "1024", "horizon", "is")


def _text(number: int) -> str:
    rng = random.Random(number)
    return f"Document {number}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """400 distinct documents of 5 to 60 words, always the same."""
    return [_text(number) for number in range(400)]


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[..., Path]:
    """Makes a folder of JSON-lines files that hold the given texts in order."""

    def write(folder: Path, texts: list[str], per_file: int = 150) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(texts), per_file):
            rows = (json.dumps({"text": text, "id": "x"}) for text in texts[start:start + per_file])
            (folder / f"part-{start:05d}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str], write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(tmp_path / "corpus", texts)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 20 batches for `corpus` instead of one."""
    monkeypatch.setattr(shards, "FIRST_BATCH_BYTES", 1 << 11)
    monkeypatch.setattr(shards, "LARGEST_BATCH_BYTES", 1 << 12)
