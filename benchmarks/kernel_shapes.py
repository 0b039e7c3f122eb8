"""The shapes at which the scans are compared, and the least time that a GPU's memory needs for each.

    floor = (inputs read once + outputs written once) / bandwidth

What is surprising: the floor counts no recomputation and nothing saved between forward and backward; the backward pass reads
its inputs again. The scans are far from the limit of the tensor cores, softmax attention is not: its floor is the longer of the
two times.
Source: paper's shapes at 160M to 410M; the bandwidths are those of a plain copy, measured, bytes read and written.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH_TB_S = {"H100": 3.0, "H200": 4.3}  # other GPUs: what a copy reaches in the same run
TENSOR_TFLOP_S = {"H100": 790.0, "H200": 790.0}
SCALAR_DECAY_BYTES = 4  # log λ per head and token is fp32 for everyone
BETA_BYTES = 4  # so is β
DECAY_CLASSES = ("scalar", "vector")
DELTA_CLASSES = ("delta_none", "delta_scalar", "delta_vector", "delta_general")
VECTOR_CLASSES = ("vector", "delta_vector", "delta_general")  # with one λ per key channel
CLASSES = DECAY_CLASSES + DELTA_CLASSES
SOFTMAX = "softmax"


class WrongArgument(ValueError):
    """Something on the command line that means nothing here: what, and what is known."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """q and k: (batch, tokens, heads, key_dim); v and o: (batch, tokens, heads, value_dim)."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, numbers: list[int] | tuple[int, ...]) -> Shape:
        """From B,T,H,D or, where they differ, B,T,H,K,V."""
        if len(numbers) not in (4, 5) or min(numbers) < 1:
            raise WrongArgument(f"a shape is B,T,H,D or B,T,H,K,V, positive; got {','.join(map(str, numbers))}")
        batch, tokens, heads, key_dim, value_dim = numbers if len(numbers) == 5 else (*numbers, numbers[3])
        return cls(batch=batch, tokens=tokens, heads=heads, key_dim=key_dim, value_dim=value_dim)

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From text as on the command line."""
        try:
            return cls.of([int(part) for part in text.split(",")])
        except ValueError as error:
            raise WrongArgument(f"--shapes: a shape is B,T,H,D or B,T,H,K,V, positive; got {text!r}") from error

    @property
    def numbers(self) -> list[int]:
        """[B, T, H, D], or [B, T, H, K, V] where K and V differ."""
        dims = [self.key_dim] if self.key_dim == self.value_dim else [self.key_dim, self.value_dim]
        return [self.batch, self.tokens, self.heads, *dims]

    @property
    def dims(self) -> tuple[int, int]:
        """What a kernel is compiled for."""
        return self.key_dim, self.value_dim

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.numbers))})"


# In order of importance: when time runs out, the last are left out. The fourth is that of the paper's rows with RoPE.
SHAPES = (
    Shape.of((32, 2048, 16, 64)),
    Shape.of((32, 2048, 12, 64)),
    Shape.of((32, 2048, 32, 64)),
    Shape.of((32, 2048, 16, 128, 64)),
    Shape.of((8, 8192, 16, 128)),
    Shape.of((1, 65536, 16, 64)),
)
# The paper's rows of the delta rule have heads of 128, 6, 8 and 16 of them.
DELTA_SHAPES = tuple(Shape.of((32, 2048, *heads)) for heads in ((16, 64), (8, 128), (6, 128), (16, 128)))
ERROR_TOKENS, ERROR_HEADS = 256, 16


def error_shape(shape: Shape) -> Shape:
    """Where errors are measured for a shape's dims: short enough for the step-by-step definition in fp64."""
    return Shape.of((1, min(shape.tokens, ERROR_TOKENS), ERROR_HEADS, *shape.dims))


def short_shape(shape: Shape) -> Shape:
    """The same to a compiler, since no kernel is made for a number of tokens, and small: many processes compile side by side.

    Few heads keep many tokens: ours cuts long sequences of few heads into segments, with kernels of their own.
    """
    tokens = max(128, 2**17 // (shape.batch * shape.heads))
    return Shape.of((shape.batch, min(shape.tokens, tokens), shape.heads, *shape.dims))


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What the hardware can do at most."""

    terabytes_per_s: float
    teraflops_per_s: float

    @classmethod
    def of(cls, gpu: str, copy_tb_s: float, matmul_tflop_s: float) -> Roofline:
        """By the GPU's name where it is known, else as measured."""
        known = next((name for name in BANDWIDTH_TB_S if name in gpu), None)
        if known is None:
            return cls(terabytes_per_s=copy_tb_s, teraflops_per_s=matmul_tflop_s)
        return cls(terabytes_per_s=BANDWIDTH_TB_S[known], teraflops_per_s=TENSOR_TFLOP_S[known])


def compulsory_bytes(shape: Shape, kind: str, element_bytes: int = 2) -> tuple[int, int]:
    """Bytes that must move in the forward and in the backward pass. kind: one of CLASSES, or softmax."""
    per_head = 0 if kind in ("delta_none", SOFTMAX) else SCALAR_DECAY_BYTES
    decay = shape.key_dim * element_bytes if kind in VECTOR_CLASSES else per_head
    general = kind == "delta_general"  # a and b as wide as a key, instead of β
    decay += BETA_BYTES if kind in DELTA_CLASSES and not general else 0
    inputs = ((4 if general else 2) * shape.key_dim + shape.value_dim) * element_bytes + decay
    output = shape.value_dim * element_bytes
    heads = shape.batch * shape.tokens * shape.heads
    return heads * (inputs + output), heads * (inputs + output + inputs)


def floor_ms(shape: Shape, kind: str, roofline: Roofline, element_bytes: int = 2) -> tuple[float, float]:
    """The least milliseconds of (forward, forward and backward)."""
    forward, backward = (n / roofline.terabytes_per_s / 1e9 for n in compulsory_bytes(shape, kind, element_bytes))
    if kind == SOFTMAX:
        pairs = shape.batch * shape.heads * shape.tokens**2 / 2
        flops = pairs * 2 * (shape.key_dim + shape.value_dim)
        product = flops / roofline.teraflops_per_s / 1e9
        forward, backward = max(forward, product), max(backward, 2.5 * product)  # five products after two
    return forward, forward + backward
