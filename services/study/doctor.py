"""Which kernel runs on this machine for a device, a dtype and a shape, and why.

What is unusual: nothing is computed. The choice is asked with tensors that have a shape and no memory, so that a batch which no
GPU could hold gets its answer too.
Source: the choice itself is in kernels/select_kernel.py, behind decay_core/kernel_seam.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from decay_core.kernel_seam import (
    explain_configuration,
    explain_decay_scan,
    explain_delta_configuration,
    explain_delta_scan,
    explain_toolchain,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHOWN = ("bf16", "fp32")  # where no dtype is asked for
GRANULARITIES = ("scalar", "vector")
SCANS = {
    "diagonal": ("decay scan", explain_decay_scan, explain_configuration),
    "delta": ("delta scan", explain_delta_scan, explain_delta_configuration),
}
PREFIX = "DECAY_"


class DoctorError(ValueError):
    """A question that cannot be answered: one line with what and what to do."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked for; None is everything that is usual."""

    device: str | None = None
    dtype: str | None = None
    granularity: str | None = None
    transition: str = "diagonal"
    batch: int = 32
    seq_len: int = 2048
    heads: int = 16
    key_dim: int = 64
    value_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row: `configuration` is that of the kernels and `origin` where it is from, both empty for plain torch."""

    granularity: str
    dtype: str
    kernel: str
    reason: str
    configuration: str = ""
    origin: str = ""


def machine() -> list[str]:
    """Lines about what is installed here and set."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)]
    return [
        f"torch {torch.__version__}, triton {_version('triton')}, GPU: {gpu}",
        f"ptxas: {explain_toolchain()}",
        f"set: {', '.join(variables) or f'no {PREFIX}* variable'}",
    ]


def answers(question: Question) -> list[Answer]:
    """A row for each granularity and dtype that is asked for. DoctorError for what this machine does not have or take."""
    device = _device(question.device)
    _check_sizes(question)
    _asked("--transition", question.transition, (), tuple(SCANS))
    granularities = _asked("--granularity", question.granularity, GRANULARITIES, GRANULARITIES)
    dtypes = _asked("--dtype", question.dtype, SHOWN, tuple(DTYPES))
    try:
        return [_answer(question, device, dtype, granularity) for granularity in granularities for dtype in dtypes]
    except ValueError as error:
        raise DoctorError(str(error)) from error


def title(question: Question) -> str:
    """The shape of the question in words."""
    shape = f"batch {question.batch}, {question.seq_len} tokens, {question.heads} heads"
    scan = SCANS[question.transition][0]
    return f"{scan} on {_device(question.device)}: {shape}, keys of {question.key_dim}, values of {question.value_dim}"


def _answer(question: Question, device: torch.device, dtype: str, granularity: str) -> Answer:
    with FakeTensorMode():
        rows = (question.batch, question.seq_len, question.heads)
        q, v = (torch.empty(*rows, size, device=device, dtype=DTYPES[dtype]) for size in (question.key_dim, question.value_dim))
        decay = torch.empty(q.shape if granularity == "vector" else rows, device=device, dtype=torch.float32)
        name, explain, configured = SCANS[question.transition]
        kernel, _, reason = explain(q, v, decay).removeprefix(f"{name}: ").partition(" (")
        configuration, origin = configured(q, v, decay) or ("", "")
    answer = {"kernel": kernel, "reason": reason.removesuffix(")"), "configuration": configuration, "origin": origin}
    return Answer(granularity=granularity, dtype=dtype, **answer)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DoctorError(f"--device {name} is no device that torch knows; try cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DoctorError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that torch can use; try cpu")
    if device.type not in ("cpu", "cuda"):
        raise DoctorError(f"--device {name}: the scans are tested on cpu and cuda alone; give one of them")
    return device


def _check_sizes(question: Question) -> None:
    for name in ("batch", "seq_len", "heads", "key_dim", "value_dim"):
        least = 0 if name in ("batch", "seq_len") else 1
        if (size := getattr(question, name)) < least:
            raise DoctorError(f"--{name.replace('_', '-')} {size} is too small; give at least {least}")


def _asked(option: str, value: str | None, usual: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return usual
    if value not in known:
        raise DoctorError(f"unknown {option} {value!r}; known: {', '.join(known)}")
    return (value,)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
