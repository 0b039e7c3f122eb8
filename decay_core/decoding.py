"""What a model remembers of the tokens it has read, so that the next ones can be read without them.

What is unusual: one call reads any number of new tokens, so that a prompt and a single new token are the same thing, and
its logits are those of the parallel form. For linear attention the size of the state does not depend on the length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """One layer's memory. `scan`: (B, H, K, V); softmax attention: the keys (B, H, T, K) here and the values in `values`.

    `past` is what the decay itself remembers, None for most.
    """

    scan: Tensor
    values: Tensor | None = None
    past: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that is there."""
        return [tensor for tensor in (self.scan, self.values, self.past) if tensor is not None]


@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """The memory of a whole model after `position` tokens. `stream`: of an encoding applied to the embedding, or None."""

    position: int
    layers: tuple[LayerState, ...]
    stream: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that is there, each with the batch as first axis."""
        found = [tensor for layer in self.layers for tensor in layer.tensors()]
        return found if self.stream is None else [*found, self.stream]

    def select(self, rows: Tensor) -> DecodeState:
        """The state with other rows of the batch (int64), as beam search needs it."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, rows)

        layers = tuple(
            LayerState(scan=layer.scan.index_select(0, rows), values=pick(layer.values), past=pick(layer.past))
            for layer in self.layers
        )
        return DecodeState(position=self.position, layers=layers, stream=pick(self.stream))
