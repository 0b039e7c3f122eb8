"""Every source of randomness of a rank, set from a seed, saved and put back.

The model draws nothing while it trains (no dropout), but a checkpoint that forgot the generators would break silently on the
day it does; DeepSpeed itself saves none (a resumed dropout run differs by 2.5e-2, measured).
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

RANK_STRIDE = 1_000_003


def make_deterministic(threads: int, deterministic: bool) -> None:
    """Fixes the number of threads (it decides the order of sums) and asks torch for deterministic kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = False


def seed_rank(seed: int, rank: int) -> None:
    """Seeds Python, NumPy and torch (CPU and CUDA) so that ranks draw differently and attempts alike."""
    value = seed * RANK_STRIDE + rank
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def random_state() -> dict[str, Any]:
    """All generators' states as tensors, integers and floats: loads with weights_only."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert kind == "MT19937"
    state: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "position": position, "has_gauss": has_gauss,
                  "cached": cached},
        "torch": torch.get_rng_state(),
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` took."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
