"""Chooses the implementation of the decay scan for a device, a dtype and a shape, and says why.

The environment variable DECAY_KERNEL (`naive` or `chunked`) overrides the choice, for finding out whether a kernel is
at fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels.decay_scan_chunked import CHUNK, decay_scan_chunked
from kernels.decay_scan_naive import decay_scan_naive

OVERRIDE = "DECAY_KERNEL"
Scan = Callable[..., tuple[Tensor, Tensor | None]]
_SCANS: dict[str, Scan] = {"naive": decay_scan_naive, "chunked": decay_scan_chunked}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An implementation and the reason for it; printing it gives one line."""

    name: str
    scan: Scan
    reason: str

    def __str__(self) -> str:
        return f"decay scan: {self.name} ({self.reason})"


def select_decay_scan(q_bthk: Tensor, v_bthv: Tensor, log_decay: Tensor) -> Choice:
    """Returns the scan for these tensors; raises ValueError when DECAY_KERNEL names no implementation."""
    wanted = os.environ.get(OVERRIDE)
    if wanted is not None:
        if wanted not in _SCANS:
            raise ValueError(
                f"{OVERRIDE}={wanted}: unknown decay scan; set it to one of {', '.join(_SCANS)} or unset it"
            )
        return Choice(name=wanted, scan=_SCANS[wanted], reason=f"{OVERRIDE} asks for it")
    kind = "vector" if log_decay.dim() == 4 else "scalar"
    what = f"{kind} decay, K={q_bthk.shape[-1]}, V={v_bthv.shape[-1]}, {q_bthk.dtype} on {q_bthk.device.type}"
    return Choice(name="chunked", scan=decay_scan_chunked, reason=f"plain torch in chunks of {CHUNK} serves {what}")
