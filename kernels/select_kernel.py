"""Chooses the implementation of the scans and of the gated norm for a device, a dtype and a shape, and says why.

On a Hopper GPU, where our Triton kernels were compared with their definitions, 16-bit tensors get them; other GPUs get plain
torch unless asked, since nobody has looked there. fp32 tensors get plain torch too: the kernels serve them (three tf32 products
for one of fp32) where DECAY_KERNEL=triton asks for it, and so do those of the delta rule. The environment variable DECAY_KERNEL
(`naive`, `chunked` or `triton`) overrides the choice for all, for finding out whether a kernel is at fault.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.decay_scan_chunked import CHUNK as DECAY_CHUNK
from kernels.decay_scan_chunked import decay_scan_chunked
from kernels.decay_scan_naive import decay_scan_naive
from kernels.decay_source import DecaySource
from kernels.delta_scan_chunked import CHUNK as DELTA_CHUNK
from kernels.delta_scan_chunked import delta_scan_chunked
from kernels.delta_scan_naive import delta_scan_naive
from kernels.dplr_scan_chunked import dplr_scan_chunked
from kernels.dplr_scan_naive import dplr_scan_naive
from kernels.gated_norm_naive import gated_norm_naive
from kernels.triton_toolchain import choose_ptxas, on_hopper

OVERRIDE = "DECAY_KERNEL"
_KINDS = {0: "no", 3: "scalar", 4: "vector"}  # by the dimensions of log λ
HALF = (torch.float16, torch.bfloat16)
Scan = Callable[..., Any]
Found = tuple[Scan | None, str | None, str | None]
_DECAY_SCANS: dict[str, Scan] = {"naive": decay_scan_naive, "chunked": decay_scan_chunked}
_DELTA_SCANS: dict[str, Scan] = {"naive": delta_scan_naive, "chunked": delta_scan_chunked}
_DPLR_SCANS: dict[str, Scan] = {"naive": dplr_scan_naive, "chunked": dplr_scan_chunked}
_said: set[str] = set()
_taken: dict[tuple[Any, ...], None] = {}  # in order
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An implementation and the reason for it; printing it gives one line."""

    recurrence: str
    name: str
    scan: Scan
    reason: str

    def __str__(self) -> str:
        return f"{self.recurrence}: {self.name} ({self.reason})"


def select_decay_scan(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource) -> Choice:
    """Returns the decay scan for these tensors; raises ValueError when DECAY_KERNEL names no implementation."""
    found = _decay_scan(q_bthk, v_bthv)
    what = _described(q_bthk, v_bthv, decay.x if isinstance(decay, DecaySource) else decay)
    return Choice(recurrence="decay scan", name=found[0], scan=found[1], reason=_reason(found, what, DECAY_CHUNK))


def _reason(found: tuple[str, Scan, str | None], what: str, chunk: int) -> str:
    name, _, refusal = found
    if name == os.environ.get(OVERRIDE):
        return f"{OVERRIDE} asks for it"
    if name == "triton":
        return f"our Triton kernels serve {what}"
    return f"plain torch in chunks of {chunk} serves {what}" + (f"; {refusal}" if refusal else "")


def decay_scan_for(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource) -> Scan:
    """The scan that `select_decay_scan` chooses; where the kernels are not chosen for a shape they lack, a warning says so
    once."""
    return _taking("decay scan", _decay_scan(q_bthk, v_bthv), q_bthk, v_bthv, decay)


def _taking(
    recurrence: str, found: tuple[str, Scan, str | None], q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None
) -> Scan:
    """The scan that was found, noted; why it is not the Triton scan is said once."""
    name, scan, refusal = found
    if torch.compiler.is_compiling():
        return scan
    if refusal and _wanted(q_bthk) and refusal not in _said:
        _said.add(refusal)
        log.warning("%s; the scan in plain torch runs instead", refusal)
    x = decay.x if isinstance(decay, DecaySource) else decay
    dims = 0 if x is None else x.dim()
    _taken[(recurrence, name, dims, q_bthk.shape[-1], v_bthv.shape[-1], q_bthk.dtype, q_bthk.device.type)] = None
    return scan


def scans_taken() -> tuple[str, ...]:
    """One line for each implementation of a scan that has been taken since `forget_scans`, outside of torch.compile, and for
    what: such as "decay scan: triton (vector decay, K=64, V=64, bfloat16 on cuda)"."""
    return tuple(
        f"{recurrence}: {name} ({_KINDS[dims]} decay, K={k}, V={v}, {str(dtype).removeprefix('torch.')} on {device})"
        for recurrence, name, dims, k, v, dtype, device in _taken
    )


def forget_scans() -> None:
    """Begins the list of `scans_taken` anew."""
    _taken.clear()


def fuses(q_bthk: Tensor, v_bthv: Tensor) -> bool:
    """Whether the scan for these tensors takes a DecaySource without forming log λ."""
    return _decay_scan(q_bthk, v_bthv)[0] == "triton"


def running_decay(f: Tensor) -> Tensor:
    """LightNet's log λ by its kernel."""
    from kernels.running_decay_triton import running_decay_triton

    return running_decay_triton(f)


def scan_configuration(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource) -> tuple[str, str] | None:
    """(fields of the configuration that the Triton scan would take, where it comes from); None for a scan in plain torch."""
    if _decay_scan(q_bthk, v_bthv)[0] != "triton":
        return None
    from kernels.decay_scan_triton import architecture_of, chosen_config, policy

    x = decay.x if isinstance(decay, DecaySource) else decay
    sizes = ("vector" if x.dim() == 4 else "scalar", q_bthk.shape[-1], v_bthv.shape[-1], q_bthk.dtype)
    config, origin = chosen_config(architecture_of(q_bthk.device), *sizes, policy())
    return _fields(config), origin


def _fields(config: Any) -> str:
    """A dataclass in one line, without fields that are None."""
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    inner = {name: f"({_fields(value)})" if is_dataclass(value) else value for name, value in given.items()}
    return ", ".join(f"{name} {value}" for name, value in inner.items() if value is not None)


def _decay_scan(q_bthk: Tensor, v_bthv: Tensor) -> tuple[str, Scan, str | None]:
    """(name, scan, why it is not the Triton scan where that can be said)."""
    return _chosen("decay scan", _DECAY_SCANS, q_bthk, lambda: _triton_scan(q_bthk, v_bthv))


def _delta_scan(q_bthk: Tensor, v_bthv: Tensor) -> tuple[str, Scan, str | None]:
    """The same of the delta scan, whose kernels wait to be asked for: not all of them have been measured on a GPU yet."""
    if os.environ.get(OVERRIDE) is None:
        refusal = f"the delta rule's Triton kernels run where {OVERRIDE}=triton asks for them" if _wanted(q_bthk) else None
        return "chunked", delta_scan_chunked, refusal
    return _chosen("delta scan", _DELTA_SCANS, q_bthk, lambda: _triton_delta_scan(q_bthk, v_bthv))


def _chosen(
    recurrence: str, plain: dict[str, Scan], q_bthk: Tensor, triton: Callable[[], Found]
) -> tuple[str, Scan, str | None]:
    wanted = os.environ.get(OVERRIDE)
    if wanted in plain:
        return wanted, plain[wanted], None
    if wanted not in (None, "triton"):
        raise ValueError(f"{OVERRIDE}={wanted}: unknown {recurrence}; set it to one of naive, chunked, triton or unset it")
    refusal = None
    if _wanted(q_bthk):
        scan, refusal, absence = triton()
        if scan is not None:
            return "triton", scan, None
        if absence and wanted is not None:
            raise ValueError(f"{OVERRIDE}={wanted}: {absence}; unset it")
    elif q_bthk.dtype == torch.float32 and on_hopper(q_bthk):
        refusal = f"the Triton kernels take fp32 where {OVERRIDE}=triton asks for them"
    return "chunked", plain["chunked"], refusal


def _wanted(q_bthk: Tensor) -> bool:
    """Whether the Triton scan is to be taken if it can be."""
    return os.environ.get(OVERRIDE) == "triton" or (q_bthk.dtype in HALF and on_hopper(q_bthk))


def toolchain() -> str:
    """One line: which assembler Triton uses here, and why."""
    return choose_ptxas()


def select_delta_scan(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None) -> Choice:
    """Returns the delta scan for these tensors; raises ValueError when DECAY_KERNEL names no implementation."""
    found = _delta_scan(q_bthk, v_bthv)
    what = _described(q_bthk, v_bthv, decay.x if isinstance(decay, DecaySource) else decay)
    return Choice(recurrence="delta scan", name=found[0], scan=found[1], reason=_reason(found, what, DELTA_CHUNK))


def delta_scan_for(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None) -> Scan:
    """The scan that `select_delta_scan` chooses, with a warning as in `decay_scan_for`."""
    return _taking("delta scan", _delta_scan(q_bthk, v_bthv), q_bthk, v_bthv, decay)


def delta_configuration(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None) -> tuple[str, str] | None:
    """As `scan_configuration`, of the delta scan."""
    if _delta_scan(q_bthk, v_bthv)[0] != "triton":
        return None
    from kernels.decay_scan_triton import architecture_of, policy
    from kernels.delta_scan_triton import chosen_config, granularity_of

    x = decay.x if isinstance(decay, DecaySource) else decay
    sizes = (granularity_of(x), q_bthk.shape[-1], v_bthv.shape[-1], q_bthk.dtype)
    config, origin = chosen_config(architecture_of(q_bthk.device), *sizes, policy())
    return _fields(config), origin


def _dplr_scan(q_bthk: Tensor, v_bthv: Tensor) -> tuple[str, Scan, str | None]:
    """As _decay_scan, of the general DPLR scan, whose kernels wait to be asked for as those of the delta rule do."""
    if os.environ.get(OVERRIDE) is None:
        refusal = f"the general DPLR's Triton kernels run where {OVERRIDE}=triton asks for them" if _wanted(q_bthk) else None
        return "chunked", dplr_scan_chunked, refusal
    return _chosen("DPLR scan", _DPLR_SCANS, q_bthk, lambda: _triton_dplr_scan(q_bthk, v_bthv))


def select_dplr_scan(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None) -> Choice:
    """Returns the general DPLR scan for these tensors; raises ValueError when DECAY_KERNEL names no implementation."""
    found = _dplr_scan(q_bthk, v_bthv)
    what = _described(q_bthk, v_bthv, decay.x if isinstance(decay, DecaySource) else decay)
    return Choice(recurrence="DPLR scan", name=found[0], scan=found[1], reason=_reason(found, what, DELTA_CHUNK))


def dplr_scan_for(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None) -> Scan:
    """The scan that `select_dplr_scan` chooses, with a warning as in `decay_scan_for`."""
    return _taking("DPLR scan", _dplr_scan(q_bthk, v_bthv), q_bthk, v_bthv, decay)


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


def _triton_scan(q_bthk: Tensor, v_bthv: Tensor) -> Found:
    """(the Triton scan or None, why it cannot serve these tensors, why there is none at all)."""
    try:
        from kernels.decay_scan_triton import absence, decay_scan_triton, refusal
    except ImportError:
        missing = "Triton is not installed"
        return None, missing, missing
    missing = absence(q_bthk.device)
    reason = missing or refusal(q_bthk, v_bthv)
    return (decay_scan_triton if reason is None else None), reason, missing


def _triton_delta_scan(q_bthk: Tensor, v_bthv: Tensor) -> Found:
    """The same of the delta scan."""
    try:
        from kernels.decay_scan_triton import absence, refusal
        from kernels.delta_scan_triton import delta_scan_triton
    except ImportError:
        missing = "Triton is not installed"
        return None, missing, missing
    missing = absence(q_bthk.device)
    reason = missing or refusal(q_bthk, v_bthv)
    return (delta_scan_triton if reason is None else None), reason, missing


def _triton_dplr_scan(q_bthk: Tensor, v_bthv: Tensor) -> Found:
    """The same of the general DPLR scan."""
    try:
        from kernels.decay_scan_triton import absence, refusal
        from kernels.dplr_scan_triton import dplr_scan_triton
    except ImportError:
        missing = "Triton is not installed"
        return None, missing, missing
    missing = absence(q_bthk.device)
    reason = missing or refusal(q_bthk, v_bthv)
    return (dplr_scan_triton if reason is None else None), reason, missing


def _described(q_bthk: Tensor, v_bthv: Tensor, log_decay: Tensor | None) -> str:
    kind = _KINDS[0 if log_decay is None else log_decay.dim()]
    return f"{kind} decay, K={q_bthk.shape[-1]}, V={v_bthv.shape[-1]}, {q_bthk.dtype} on {q_bthk.device.type}"
