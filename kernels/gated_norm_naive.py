"""The output gate and the norm after it, in plain torch: the definition that the fused kernel is compared with.

    y = √d · x / √(Σ x² + ε) ⊙ gain        x = o ⊙ σ(gate)

What is unusual: the gate comes before the norm, the norm spans the whole width (all heads), and ε is added to the sum of
squares, not to their mean.
Source: the paper's block (arXiv 2509.05282).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_norm_naive(o_btd: Tensor, gate_btd: Tensor, gain_d: Tensor, eps: float) -> Tensor:
    """o, gate (..., d) and gain (d) to y (..., d), computed in fp32, or float64 when o is float64; in that dtype."""
    wide, width = torch.promote_types(o_btd.dtype, torch.float32), o_btd.shape[-1]
    gated = o_btd.to(wide) * torch.sigmoid(gate_btd).to(wide)
    return F.rms_norm(gated, (width,), gain_d.to(wide), eps / width)
