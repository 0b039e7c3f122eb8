"""What every transition is: how the state moves from one token to the next.

What is unusual: a transition may bring a token mixer of its own (`mixer`), as softmax attention does, which has no state to
move. Everyone else shares the mixer of decay_core/mixer.py and gives the scan.
Source: the paper's sections 3 (diagonal) and 5.6 (diagonal plus low rank).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from decay_core import positions
from decay_core.position import Position

if TYPE_CHECKING:
    from decay_core.decay import DecayPlace
    from decay_core.design import DesignPoint, Form
    from decay_core.kernel_seam import DecaySource
    from decay_core.objection import Objection
    from decay_core.sizes import Size


class Transition(nn.Module):
    """One transition in one layer."""

    reads_decay: ClassVar[bool] = True  # False: there is no λ, and the point's name does not spell a decay
    writes: ClassVar[tuple[str, ...]] = ()  # what the axis `write` may say
    mixer: ClassVar[type[nn.Module] | None] = None  # a mixer of its own, called (place, inner_gain)
    fuses: ClassVar[bool] = False  # whether `scan` takes a decay as a formula, and a key that is 1 - λ as None
    operations: ClassVar[int] = 5  # on each number of the state and token, forward: fade 1, write 2, read 2

    def __init__(self, place: DecayPlace) -> None:
        super().__init__()
        self.place = place

    @classmethod
    def refusal(cls, point: DesignPoint) -> Objection | None:
        """Why this transition does not go with `point`; None when it does. `point` is well written."""
        return None

    @classmethod
    def head_dim(cls, size: Size, form: Form) -> int:
        """The width of a head where the point does not give one."""
        return size.head_dim

    @classmethod
    def encoding(cls, place: DecayPlace) -> Position:
        """The position encoding of this layer."""
        return positions.get(place.point.position)(place.head_dim, place.point.form)

    @classmethod
    def state_size(cls, place: DecayPlace, key_width: int, length: int) -> int:
        """Numbers that one layer holds for one sequence after `length` tokens."""
        return place.heads * key_width * place.head_dim

    def prepare_key(self, k_bthk: Tensor) -> Tensor:
        """What happens to the keys before their position is encoded."""
        return k_bthk

    def scan(
        self,
        x_btd: Tensor,
        qkv: tuple[Tensor, Tensor | None, Tensor],
        log_decay: Tensor | DecaySource,
        state_bhkv: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, T, H, V) in fp32 or wider, and the state after the last token where `keep` asks for it.

        x_btd is the mixer's input; q, k (B, T, H, K), v (B, T, H, V); log_decay (B, T, H) or (B, T, H, K).
        """
        raise NotImplementedError
