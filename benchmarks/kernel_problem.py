"""What a contestant is: inputs that are the same for all, a problem made of them, and how flash-linear-attention is imported.

What is surprising: FLA 0.6.0 refuses some backward passes on Hopper with Triton 3.4 to 3.7.0, which miscompiles them. The guard
is lifted for the sake of their times, a remark says so, and their errors stand beside.
Source: fla-core 0.6.0.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FLA_VERSION = "0.6.0"


class NotHere(Exception):
    """A contestant that cannot take part: why, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """f: what a model's projection gives for the decay; log_decay: what the formula makes of it, as tensors are handed over.

    beta: of the delta rule, in fp32; its keys have norm 1. kind: one of CLASSES.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    f: Tensor
    gain: Tensor
    offset: Tensor
    slope: float
    log_decay: Tensor
    beta: Tensor
    kind: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """leaves: what has gradients, by name. reference: the output from the leaves in fp64."""

    leaves: dict[str, Tensor]
    call: Callable[[], Tensor]
    do: Tensor
    reference: Callable[[dict[str, Tensor]], Tensor]

    def gradients(self) -> tuple[Tensor, ...]:
        """Forward and backward: (o, gradients of the leaves)."""
        o = self.call()
        return (o, *torch.autograd.grad(o, list(self.leaves.values()), self.do))


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """tuned: it times configurations of its kernels at its first call. optional: takes part only when asked for.

    prepare: imports what it needs and returns a remark; raises NotHere.
    """

    name: str
    classes: tuple[str, ...]
    problem: Callable[[Inputs], Problem]
    ours: bool = False
    tuned: bool = False
    optional: bool = False
    prepare: Callable[[], str | None] = lambda: None


def leaves_of(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def seam() -> Any:
    return importlib.import_module("decay_core.kernel_seam")


def fla() -> str | None:
    """Imports it; returns what there is to say."""
    try:
        version = importlib.metadata.version("fla-core")
        if "fla.ops" not in sys.modules:  # its __init__ imports forty operators, which takes seconds in every process
            package = sys.modules["fla.ops"] = ModuleType("fla.ops")
            package.__path__ = [f"{folder}/ops" for folder in importlib.import_module("fla").__path__]
        importlib.import_module("fla.ops.common.chunk_o")
    except ImportError as error:
        raise NotHere(f"pip install fla-core=={FLA_VERSION} einops ({error})") from error
    return None if version == FLA_VERSION else f"fla-core is {version}, not {FLA_VERSION}"


def fla_unguarded() -> str | None:
    """The same, with its refusal of a backward pass that Triton miscompiles lifted."""
    said = fla()
    module: Any = importlib.import_module("fla.ops.common.chunk_o")
    if not module.IS_NVIDIA_HOPPER or not module.TRITON_ABOVE_3_4_0 or module.TRITON_ABOVE_3_7_1:
        return said
    module.TRITON_ABOVE_3_7_1 = True
    lifted = "FLA refuses this backward pass on Hopper with this Triton; lifted for timing, its gradients may be wrong"
    return "; ".join(filter(None, (said, lifted)))
