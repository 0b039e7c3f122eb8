"""How far a long reading of text has come: a bar on a terminal, a line every ten seconds in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 10.0


class Progress:
    """Counts bytes of text on stderr. `total` is an estimate or None; `shown` False keeps silent."""

    def __init__(self, what: str, total: int | None, shown: bool) -> None:
        self._what, self._total, self._done = what, total, 0
        self._lines = shown and not sys.stderr.isatty()
        self._spoken_s = self._started_s = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr, disable=not shown or self._lines)

    def add(self, n_bytes: int) -> None:
        """Count `n_bytes` more."""
        self._done += n_bytes
        self._bar.update(n_bytes)
        if self._lines and time.monotonic() - self._spoken_s >= LINE_EVERY_S:
            self._spoken_s = time.monotonic()
            self._say()

    def _say(self) -> None:
        total = "" if self._total is None else f" of about {self._total / 1e6:.0f}"
        print(
            f"{self._what}: {self._done / 1e6:.0f}{total} MB of text, {time.monotonic() - self._started_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._lines and kind is None:
            self._say()
