"""Chooses the implementation of the scans and of the gated norm for a device, a dtype and a shape, and says why.

On a Hopper GPU, where our Triton kernels were compared with their definitions, 16-bit tensors get them; other GPUs get plain
torch unless asked, since nobody has looked there. The delta scan has no kernel yet. The environment variable DECAY_KERNEL
(`naive` or `chunked`, and for the decay scan `triton`) overrides the choice for all, for finding out whether a kernel is at
fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.decay_scan_chunked import CHUNK as DECAY_CHUNK
from kernels.decay_scan_chunked import decay_scan_chunked
from kernels.decay_scan_naive import decay_scan_naive
from kernels.delta_scan_chunked import CHUNK as DELTA_CHUNK
from kernels.delta_scan_chunked import delta_scan_chunked
from kernels.delta_scan_naive import delta_scan_naive
from kernels.gated_norm_naive import gated_norm_naive
from kernels.triton_toolchain import on_hopper

OVERRIDE = "DECAY_KERNEL"
HALF = (torch.float16, torch.bfloat16)  # fp32 queries go to the chunked scan: the kernels were not timed for them
Scan = Callable[..., Any]
_DECAY_SCANS: dict[str, Scan] = {"naive": decay_scan_naive, "chunked": decay_scan_chunked}
_DELTA_SCANS: dict[str, Scan] = {"naive": delta_scan_naive, "chunked": delta_scan_chunked}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An implementation and the reason for it; printing it gives one line."""

    recurrence: str
    name: str
    scan: Scan
    reason: str

    def __str__(self) -> str:
        return f"{self.recurrence}: {self.name} ({self.reason})"


def select_decay_scan(q_bthk: Tensor, v_bthv: Tensor, log_decay: Tensor) -> Choice:
    """Returns the decay scan for these tensors; raises ValueError when DECAY_KERNEL names no implementation."""
    what = _described(q_bthk, v_bthv, log_decay)
    wanted, scans = os.environ.get(OVERRIDE), _DECAY_SCANS
    if wanted == "triton" or (wanted is None and q_bthk.dtype in HALF and on_hopper(q_bthk)):
        scan, refusal = _triton_scan(q_bthk, v_bthv)
        if scan is None and wanted is not None:
            raise ValueError(f"{OVERRIDE}={wanted}: {refusal}; unset it")
        if scan is not None and wanted is None:
            return Choice(recurrence="decay scan", name="triton", scan=scan, reason=f"our Triton kernels serve {what}")
        scans = scans if scan is None else {**scans, "triton": scan}
        what += f"; {refusal}" if refusal else ""
    return _choose("decay scan", scans, f"plain torch in chunks of {DECAY_CHUNK} serves {what}")


def select_delta_scan(q_bthk: Tensor, v_bthv: Tensor, log_decay: Tensor | None) -> Choice:
    """Returns the delta scan for these tensors; raises ValueError when DECAY_KERNEL names no implementation."""
    what = _described(q_bthk, v_bthv, log_decay)
    return _choose("delta scan", _DELTA_SCANS, f"plain torch in chunks of {DELTA_CHUNK} serves {what}")


def select_gated_norm(o_btd: Tensor, gate_btd: Tensor) -> Choice:
    """Returns the gate with its norm for these tensors: fused for 16-bit gates on Hopper, unless DECAY_KERNEL differs."""
    wanted = os.environ.get(OVERRIDE, "triton" if on_hopper(gate_btd) else "naive")
    if wanted == "triton" and gate_btd.is_cuda and gate_btd.dtype in HALF:
        try:
            from kernels.gated_norm_triton import WIDEST, gated_norm_triton
        except ImportError:
            return Choice(recurrence="gated norm", name="naive", scan=gated_norm_naive, reason="Triton is not installed")
        if gate_btd.shape[-1] <= WIDEST:
            return Choice(recurrence="gated norm", name="triton", scan=gated_norm_triton, reason="one kernel each way")
    return Choice(recurrence="gated norm", name="naive", scan=gated_norm_naive, reason=f"plain torch on {o_btd.device.type}")


def _choose(recurrence: str, scans: dict[str, Scan], reason: str) -> Choice:
    wanted = os.environ.get(OVERRIDE)
    if wanted is None:
        return Choice(recurrence=recurrence, name="chunked", scan=scans["chunked"], reason=reason)
    if wanted not in scans:
        raise ValueError(f"{OVERRIDE}={wanted}: unknown {recurrence}; set it to one of {', '.join(scans)} or unset it")
    return Choice(recurrence=recurrence, name=wanted, scan=scans[wanted], reason=f"{OVERRIDE} asks for it")


def _triton_scan(q_bthk: Tensor, v_bthv: Tensor) -> tuple[Scan | None, str | None]:
    """(the Triton scan, None), or (None, why it cannot serve these tensors)."""
    try:
        from kernels.decay_scan_triton import decay_scan_triton, refusal
    except ImportError:
        return None, "Triton is not installed"
    reason = refusal(q_bthk, v_bthv)
    return (decay_scan_triton, None) if reason is None else (None, reason)


def _described(q_bthk: Tensor, v_bthv: Tensor, log_decay: Tensor | None) -> str:
    kind = "no" if log_decay is None else "vector" if log_decay.dim() == 4 else "scalar"
    return f"{kind} decay, K={q_bthk.shape[-1]}, V={v_bthv.shape[-1]}, {q_bthk.dtype} on {q_bthk.device.type}"
