"""The model sizes: three of the paper, three small ones that fit a laptop and three beyond the paper.

Source: the paper's Table 5; there the GLU's inner width is 8d/3 rounded up to a multiple of 256. `nano`, `micro` and
`mini` are ours: a nano step of 2,048 tokens takes about 0.2 s on one CPU core. 3B, 7B and 13B follow the paper's rule
for the GLU and keep heads of 64.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """Width, depth and heads of a model. `glu_dim` is the inner width of the channel mixer."""

    name: str
    d_model: int
    layers: int
    heads: int
    glu_dim: int

    def __post_init__(self) -> None:
        if min(self.d_model, self.layers, self.heads, self.glu_dim) < 1:
            raise ValueError(f"size {self.name}: d_model, layers, heads and glu_dim must be positive")
        if self.d_model % self.heads:
            raise ValueError(f"size {self.name}: d_model {self.d_model} is no multiple of heads {self.heads}")

    @property
    def head_dim(self) -> int:
        """Width of one head; also the rank of the output gate and of the vector decay's projection."""
        return self.d_model // self.heads


_ALL = (
    Size(name="nano", d_model=128, layers=2, heads=4, glu_dim=256),
    Size(name="micro", d_model=256, layers=4, heads=4, glu_dim=768),
    Size(name="mini", d_model=512, layers=8, heads=8, glu_dim=1536),
    Size(name="160M", d_model=768, layers=12, heads=12, glu_dim=2048),
    Size(name="410M", d_model=1024, layers=24, heads=16, glu_dim=2816),
    Size(name="1.45B", d_model=2048, layers=24, heads=32, glu_dim=5632),
    Size(name="3B", d_model=2560, layers=32, heads=40, glu_dim=6912),
    Size(name="7B", d_model=4096, layers=32, heads=64, glu_dim=11008),
    Size(name="13B", d_model=5120, layers=40, heads=80, glu_dim=13824),
)
SIZES: dict[str, Size] = {size.name: size for size in _ALL}


def get_size(name: str) -> Size:
    """Returns the size called `name`; raises ValueError naming the known ones."""
    if name not in SIZES:
        raise ValueError(f"unknown size {name!r}; known sizes: {', '.join(SIZES)}")
    return SIZES[name]
