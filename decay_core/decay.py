"""What every decay mechanism is: a module that turns the activation f into the logarithm of the decay.

What is unusual: the module returns log λ and, when the key is shared, the key too, because both read the same
parameters and a parameter is only ever read inside its own module's forward (DeepSpeed ZeRO-3 has it in memory only
there). Arithmetic is at least fp32, also under autocast: λ near 1 does not survive bf16, where log σ(f) is 0 from f =
6.24 on. Models cast to float64 compute in float64.
Source: paper appendix A.2; f is W_f x, low-rank for vector decay, one number a head for scalar decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from decay_core.kernel_seam import DecaySource
from decay_core.objection import Objection

if TYPE_CHECKING:
    from decay_core.design import DesignPoint, Form

GROWTH_LENGTH = 2048  # tokens of the paper's texts
LARGEST_GROWTH = 80.0  # in log: e^88 is beyond fp32, and the state holds sums


@dataclass(frozen=True, kw_only=True)
class DecayPlace:
    """Where a decay sits: the design point, its layer (counted from 0) and the sizes around it.

    `layer_shift` is added to the layer's number where a formula reads it (TPE as run).
    """

    point: DesignPoint
    layer: int
    layers: int
    heads: int
    head_dim: int
    layer_shift: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one token's log decay: (heads,) for scalar decay, (heads, head_dim) for vector decay, (heads,
        head_dim / 2) for paired decay."""
        channels = {"vector": (self.head_dim,), "paired": (self.head_dim // 2,)}
        return (self.heads, *channels.get(self.point.granularity, ()))


class DecayMechanism(nn.Module):
    """A module whose own parameters are the decay mechanism's (a, δ, Δ, θ, Λ): a recipe may treat them apart."""

    def draw(self, generator: torch.Generator) -> None:
        """Gives every own parameter its initial value, random ones from `generator` (a CPU generator)."""


class Decay(DecayMechanism):
    """One decay mechanism in one layer. Subclasses declare what they support and give the formula in `log_decay`."""

    granularities: ClassVar[tuple[str, ...]] = ("vector", "paired", "scalar")
    takes_p: ClassVar[bool] = False
    reads_input: ClassVar[bool] = True  # False: λ is one number per head and there is no f

    def __init__(self, place: DecayPlace) -> None:
        super().__init__()
        self.place = place

    @classmethod
    def sharing_refusal(cls, form: Form) -> Objection | None:
        """Why the key cannot be shared (k = 1 - λ) in this form; None when it can."""
        return None

    @classmethod
    def place_refusal(cls, place: DecayPlace) -> Objection | None:
        """Why this decay cannot sit in this layer of a model of this size; None when it can."""
        return None

    @classmethod
    def joint_module(cls, place: DecayPlace) -> DecayMechanism | None:
        """A module of the whole model that the decays of all layers read; None where there is none.

        It is evaluated once a forward, and row l of its output goes to layer l.
        """
        return None

    def forward(
        self, f: Tensor, joint: Tensor | None = None, past: Tensor | None = None, fused: bool = False
    ) -> tuple[Tensor | DecaySource | None, Tensor | None]:
        """Returns (log λ, shared key or None), in fp32 or wider; or, `fused`, what `source` returns in the place of log λ.

        f: (B, T, *place.shape); where `reads_input` is False any activation, of which only device and dtype are looked
        at. joint: this layer's row of the joint module's output. past: what `remember` returned for the tokens before.
        log λ and the key have f's shape; a constant log λ is (heads,).
        """
        with torch.autocast(f.device.type, enabled=False):
            if fused:
                return self.source(f, joint), None
            f = f.to(wide_dtype(f.dtype))
            log_decay = self.log_decay(f, joint)
            key = self.shared_key(f, log_decay, joint) if self.place.point.share else None
        return log_decay, key

    def remember(self, f: Tensor, past: Tensor | None) -> Tensor | None:
        """What decoding has to keep of the tokens up to the end of f, with the batch as first axis; None where λ reads
        its own token alone."""
        return None

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        """The formula: log λ from f (already fp32 or wider)."""
        raise NotImplementedError

    def source(self, f: Tensor, joint: Tensor | None) -> DecaySource | None:
        """The formula of `log_decay` for a kernel that computes it from f itself; None where no kernel knows it, or where a
        shared key is not 1 - λ. Parameters go in as copies: what is made of them is read outside this module's forward.
        """
        return None

    def shared_key(self, f: Tensor, log_decay: Tensor, joint: Tensor | None) -> Tensor:
        """k = 1 - λ without the subtraction, which would lose λ near 1."""
        return -torch.expm1(log_decay)


class ConstantDecay(Decay):
    """A decay that reads no input: one fixed λ per head."""

    granularities = ("scalar",)
    reads_input = False

    def __init__(self, place: DecayPlace) -> None:
        super().__init__(place)
        # Not a buffer: casting a model to bf16 casts its buffers, and λ = 0.999999 would become 1.
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def constants(self) -> list[float]:
        """log λ of every head."""
        raise NotImplementedError

    @classmethod
    def place_refusal(cls, place: DecayPlace) -> Objection | None:
        growth = GROWTH_LENGTH * max(cls(place).constants())
        if growth <= LARGEST_GROWTH:
            return None
        return Objection(
            "kernel",
            f"{place.point.decay} with {place.point.position} as run has a decay above 1 in layer {place.layer + 1} of "
            f"{place.layers}: the state grows by e^{growth:.0f} over {GROWTH_LENGTH} tokens, more than fp32 holds",
        )

    def log_decay(self, f: Tensor, joint: Tensor | None) -> Tensor:
        where = (f.device, f.dtype)
        if where not in self._placed:
            self._placed[where] = torch.tensor(self.constants(), device=f.device, dtype=f.dtype)
        return self._placed[where]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which decays and states are computed: float64 stays, everything else becomes fp32."""
    return torch.promote_types(dtype, torch.float32)
