"""The delta rule with decay (DPLR, diagonal plus low rank): what a key pointed at is partly erased before it is written.

S_t = (I - β k kᵀ) diag(λ_t) S_{t-1} + w k v_tᵀ with |k| = 1, β = 2σ(W_β x) in (0, 2) and w = β or 1.
What is surprising: as run, heads are 128 wide and not the 64 of the paper's Table 5 (the printed parameter counts prove
it), which doubles the state, and vector decay writes with w = 1 while no decay and scalar decay write with w = β. So the
paper's comparison of vector with scalar changes two things at once; the axes `write` and `head_dim` take them apart.
Queries are not normalised, and the epsilon stands inside the root, so |k| < 1 for tiny keys.
Source: paper section 5.6, Tables 4 and 9; delta rule: arXiv 2406.06484.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decay_core.decay import DecayPlace, wide_dtype
from decay_core.design import DesignPoint, Form
from decay_core.kernel_seam import DecaySource, delta_scan
from decay_core.layers import Projection
from decay_core.objection import Objection
from decay_core.sizes import Size
from decay_core.transition import Transition

KEY_EPS = 1e-5  # inside the root
WIDTH_AS_RUN = 128


class Delta(Transition):
    """One projection, from the input to one β per head."""

    writes = ("beta", "plain")
    operations = 7  # the key reads the state too before it is written

    def __init__(self, place: DecayPlace) -> None:
        super().__init__(place)
        self.beta = Projection(place.heads * place.head_dim, place.heads)
        point = place.point
        plain_as_run = point.form == "as_run" and point.granularity != "scalar"
        self.beta_on_write = not plain_as_run if point.write is None else point.write == "beta"

    @classmethod
    def refusal(cls, point: DesignPoint) -> Objection | None:
        if point.share:
            return Objection("scope", "the delta rule normalises its key, so the key cannot be 1 - decay")
        if point.form == "as_run" and point.position != DesignPoint.position:
            return Objection("scope", f"{point.position} with the delta rule is in none of the paper's runs")
        return None

    @classmethod
    def head_dim(cls, size: Size, form: Form) -> int:
        return min(WIDTH_AS_RUN, size.d_model) if form == "as_run" else size.head_dim

    def prepare_key(self, k_bthk: Tensor) -> Tensor:
        k_bthk = k_bthk.to(wide_dtype(k_bthk.dtype))
        return k_bthk / (k_bthk.square().sum(dim=-1, keepdim=True) + KEY_EPS).sqrt()

    def scan(
        self,
        x_btd: Tensor,
        qkv: tuple[Tensor, Tensor | None, Tensor],
        log_decay: Tensor | DecaySource,
        state_bhkv: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.beta(x_btd)
        beta_bth = 2 * torch.sigmoid(logits.to(wide_dtype(logits.dtype)))
        q_bthk, k_bthk, v_bthv = qkv
        assert k_bthk is not None and isinstance(log_decay, Tensor), "only a transition that fuses is given formulas"
        return delta_scan(q_bthk, k_bthk, v_bthv, beta_bth, log_decay, self.beta_on_write, state_bhkv, keep)
