"""The one door to kernels/: nothing else in the project imports that folder.

What is unusual: the folder has the name of Hugging Face's package `kernels`, which transformers imports, so it has no
__init__.py and its path is appended to whichever package of that name Python finds first. Both then work: `import
kernels` still gives Hugging Face's.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.decay_source import DecaySource as DecaySource

_FOLDER = str(Path(__file__).resolve().parent.parent / "kernels")


def _load_selector() -> Any:
    package: Any = None
    with suppress(ModuleNotFoundError):  # decay_core was installed in place: the checkout itself is not on the path
        package = importlib.import_module("kernels")
    if not hasattr(package, "__path__"):  # or a script beside a file kernels.py is running
        package = sys.modules["kernels"] = ModuleType("kernels")
        package.__path__ = []
    if _FOLDER not in package.__path__:
        package.__path__.append(_FOLDER)
    return importlib.import_module("kernels.select_kernel")


_SELECTOR = _load_selector()
if not TYPE_CHECKING:
    DecaySource = _SELECTOR.DecaySource


def decay_scan(
    q_bthk: Tensor,
    k_bthk: Tensor | None,
    v_bthv: Tensor,
    decay: Tensor | DecaySource,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t by the fastest implementation there is for
    these tensors.

    decay: natural log of λ, (B, T, H) or (B, T, H, K), or the DecaySource that makes it; without k the key is 1 - λ.
    cu_seqlens: (N + 1,), where N sequences packed into one row begin and end. exact: outputs up to t are the same bits
    whatever follows, at some cost on a GPU. Returns (o (B, T, H, V), state (B or N, H, K, V) or None) in fp32 or wider, also
    under autocast; a kernel for 16-bit tensors gives o in v's dtype, summed in fp32 and rounded once. ValueError for arguments
    that do not fit. Source: kernels/decay_scan_naive.py is the definition.
    """
    with torch.autocast(q_bthk.device.type, enabled=False):
        scan = _SELECTOR.decay_scan_for(q_bthk, v_bthv, decay)
        options = (initial_state, output_final_state, scale, cu_seqlens, exact)
        o_bthv, state = scan(q_bthk, k_bthk, v_bthv, decay, *options)
    return o_bthv, state


def explain_decay_scan(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource) -> str:
    """One line: which implementation `decay_scan` would take for these tensors, and why."""
    return str(_SELECTOR.select_decay_scan(q_bthk, v_bthv, decay))


def scans_taken() -> tuple[str, ...]:
    """One line for each implementation that `decay_scan` and `delta_scan` have taken since `forget_scans`, and for what."""
    taken: tuple[str, ...] = _SELECTOR.scans_taken()
    return taken


def forget_scans() -> None:
    """Begins the list of `scans_taken` anew."""
    _SELECTOR.forget_scans()


def explain_configuration(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource) -> tuple[str, str] | None:
    """(the configuration of the kernels that `decay_scan` would launch, where it comes from); None where it launches none."""
    found: tuple[str, str] | None = _SELECTOR.scan_configuration(q_bthk, v_bthv, decay)
    return found


def explain_toolchain() -> str:
    """One line: which assembler the kernels are compiled with here, and why."""
    return str(_SELECTOR.toolchain())


def fuses(q_bthk: Tensor, v_bthv: Tensor) -> bool:
    """Whether the implementation for these tensors takes a DecaySource without forming log λ. Elsewhere log λ is formed
    anyway, and a caller may as well form it by its own formula."""
    fused: bool = _SELECTOR.fuses(q_bthk, v_bthv)
    return fused


def running_decay(f: Tensor) -> Tensor:
    """LightNet's log λ (B, T, ...) in fp32 by a kernel, where `fuses` holds. Source: decays/lightnet.py defines it."""
    log_decay: Tensor = _SELECTOR.running_decay(f)
    return log_decay


def gated_norm(o_btd: Tensor, gate_btd: Tensor, gain_d: Tensor, eps: float) -> Tensor:
    """√d x / √(Σ x² + eps) ⊙ gain with x = o ⊙ σ(gate), over the last axis: (..., d) in fp32 or wider, or, from a kernel for
    16-bit gates, in the gate's dtype. Source: kernels/gated_norm_naive.py is the definition.
    """
    with torch.autocast(o_btd.device.type, enabled=False):
        y_btd: Tensor = _SELECTOR.select_gated_norm(o_btd, gate_btd).scan(o_btd, gate_btd, gain_d, eps)
    return y_btd


def delta_scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    decay: Tensor | DecaySource | None = None,
    beta_on_write: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
    normalize_key: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence S_t = (I − β_t k_t k_tᵀ) diag(λ_t) S_{t-1} + w_t k_t v_tᵀ, o_t = scale · S_tᵀ q_t by the fastest
    implementation there is for these tensors; w = β or, without beta_on_write, 1.

    decay: natural log of λ, (B, T, H) or (B, T, H, K), the DecaySource that makes it, or None for λ = 1. normalize_key: k is
    made k / √(Σ k² + 1e-5) first. The rest, and what is returned, is as in decay_scan. Source: kernels/delta_scan_naive.py is
    the definition.
    """
    with torch.autocast(q_bthk.device.type, enabled=False):
        scan = _SELECTOR.delta_scan_for(q_bthk, v_bthv, decay)
        options = (initial_state, output_final_state, scale, cu_seqlens, exact, normalize_key)
        o_bthv, state = scan(q_bthk, k_bthk, v_bthv, beta_bth, decay, beta_on_write, *options)
    return o_bthv, state


def explain_delta_scan(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None = None) -> str:
    """One line: which implementation `delta_scan` would take for these tensors, and why."""
    return str(_SELECTOR.select_delta_scan(q_bthk, v_bthv, decay))


def explain_delta_configuration(
    q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None = None
) -> tuple[str, str] | None:
    """As explain_configuration, of `delta_scan`."""
    found: tuple[str, str] | None = _SELECTOR.delta_configuration(q_bthk, v_bthv, decay)
    return found


def dplr_scan(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    a_bthk: Tensor,
    b_bthk: Tensor,
    decay: Tensor | DecaySource | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence S_t = (diag(λ_t) + a_t b_tᵀ) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t by the fastest implementation
    there is for these tensors.

    decay: natural log of λ, (B, T, H, K), the DecaySource that makes it, or None for λ = 1. The rest, and what is returned, is
    as in decay_scan. Source: kernels/dplr_scan_naive.py is the definition.
    """
    with torch.autocast(q_bthk.device.type, enabled=False):
        scan = _SELECTOR.dplr_scan_for(q_bthk, v_bthv, decay)
        options = (initial_state, output_final_state, scale, cu_seqlens, exact)
        o_bthv, state = scan(q_bthk, k_bthk, v_bthv, a_bthk, b_bthk, decay, *options)
    return o_bthv, state


def explain_dplr_scan(q_bthk: Tensor, v_bthv: Tensor, decay: Tensor | DecaySource | None = None) -> str:
    """One line: which implementation `dplr_scan` would take for these tensors, and why."""
    return str(_SELECTOR.select_dplr_scan(q_bthk, v_bthv, decay))
