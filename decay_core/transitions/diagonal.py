"""The diagonal transition: every row of the state fades by its own λ, and the new token is added.

S_t = diag(λ_t) S_{t-1} + k_t v_tᵀ.
Source: the paper's section 3.
"""

from __future__ import annotations

from torch import Tensor

from decay_core.kernel_seam import DecaySource, decay_scan
from decay_core.transition import Transition


class Diagonal(Transition):
    """No parameters."""

    fuses = True

    def scan(
        self,
        x_btd: Tensor,
        qkv: tuple[Tensor, Tensor | None, Tensor],
        log_decay: Tensor | DecaySource,
        state_bhkv: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        return decay_scan(*qkv, log_decay, state_bhkv, keep)
