"""Which assembler Triton may use on a Hopper GPU: chosen once, before the first kernel is compiled.

What is surprising: the ptxas that Triton 3.6 and 3.7 carry (12.8) miscompiles kernels with many products on Hopper, some into
wrong numbers, some into invalid memory accesses. A newer one is looked for where pip and CUDA put it; where there is none, a
warning says so.
Source: triton-lang/triton issues 9433, 10486 and 11781; flash-linear-attention issues 640 and 1262.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VARIABLE = "TRITON_PTXAS_PATH"
SAFE = (13, 1)
HOPPER = 9
log = logging.getLogger(__name__)


@cache
def choose_ptxas() -> str:
    """Sets TRITON_PTXAS_PATH unless it is set, on Hopper only; returns one line that says what is used and why."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != HOPPER:
        return "Triton's own ptxas: no Hopper GPU"
    if os.environ.get(VARIABLE):
        return f"{os.environ[VARIABLE]}: {VARIABLE} asks for it"
    for path in _candidates():
        version = _version(path)
        if version >= SAFE:
            os.environ[VARIABLE] = str(path)
            return f"{path}: version {version[0]}.{version[1]}"
    said = (
        f"no ptxas of version {SAFE[0]}.{SAFE[1]} or newer found, Triton's own may miscompile on Hopper; "
        f"pip install 'nvidia-cuda-nvcc>=13.3', or set {VARIABLE}"
    )
    log.warning(said)
    return said


def on_hopper(tensor: Tensor) -> bool:
    """Whether a tensor lies on a GPU of the kind on which the kernels were checked."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == HOPPER


def _candidates() -> list[Path]:
    packages = [Path(folder) / "nvidia" / "cu13" / "bin" / "ptxas" for folder in sys.path]
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return [path for path in (*packages, Path(toolkit) / "bin" / "ptxas") if path.is_file() and os.access(path, os.X_OK)]


def _version(path: Path) -> tuple[int, int]:
    try:
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=30).stdout
    except OSError:
        return (0, 0)
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)
