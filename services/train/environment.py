"""What a process must know before it makes its first CUDA context and imports DeepSpeed."""

from __future__ import annotations

import os


def prepare_process(threads: int, gpus: float) -> None:
    """Sets environment variables of this process. Call it first in every worker; the loop sets torch's threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if gpus == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"


def device_of(gpus: float) -> str:
    """The device of this worker: Ray shows each process only its own GPU, so it is always the first."""
    return "cuda:0" if gpus > 0 else "cpu"


def device_name(device: str) -> str:
    """ "cpu", or the GPU's name as its driver says it."""
    import torch

    return device if device == "cpu" else str(torch.cuda.get_device_name(device))
