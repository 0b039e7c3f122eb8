"""The accelerators a plan can be priced on: what their vendor says of speed and memory.

What is unusual: speeds are dense. Data sheets print twice as much beside a footnote about sparsity, which training has none of.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from services.study.file import StudyError


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """`tflops` is dense bf16 with fp32 sums; `marks` are the words of the name that its driver gives it."""

    name: str
    tflops: float
    memory_gib: float
    marks: tuple[str, ...]

    def is_called(self, device: str) -> bool:
        """Whether a device of this name, as torch gives it, is one of these."""
        return all(mark.casefold() in device.casefold() for mark in self.marks)


# NVIDIA's data sheets of the SXM modules where there are several (V100 2020, A100 2021, H100 2023, H200 2023, HGX B200 2024,
# L40S 2023) and its Ada whitepaper for the RTX 4090; halved where the sheet counts sparsity. A V100 has no bf16: its fp16.
ACCELERATORS = {
    gpu.name: gpu
    for gpu in (
        Accelerator(name="V100-16GB", tflops=125.0, memory_gib=16, marks=("V100", "16GB")),
        Accelerator(name="V100-32GB", tflops=125.0, memory_gib=32, marks=("V100", "32GB")),
        Accelerator(name="A100-40GB", tflops=312.0, memory_gib=40, marks=("A100", "40GB")),
        Accelerator(name="A100-80GB", tflops=312.0, memory_gib=80, marks=("A100", "80GB")),
        Accelerator(name="H100", tflops=989.4, memory_gib=80, marks=("H100",)),
        Accelerator(name="H200", tflops=989.4, memory_gib=141, marks=("H200",)),
        Accelerator(name="B200", tflops=2250.0, memory_gib=180, marks=("B200",)),
        Accelerator(name="L40S", tflops=362.0, memory_gib=48, marks=("L40S",)),
        Accelerator(name="RTX-4090", tflops=165.2, memory_gib=24, marks=("RTX 4090",)),
    )
}


def get_accelerator(name: str) -> Accelerator:
    """The accelerator of this name, whatever its case. Raises StudyError naming the known ones."""
    known = {key.casefold(): gpu for key, gpu in ACCELERATORS.items()}
    wanted = name.strip().casefold().replace(" ", "-")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, list(known), n=1)
    guess = f" (did you mean {known[near[0]].name}?)" if near else ""
    raise StudyError(f"unknown --gpu {name!r}{guess}; known: {', '.join(ACCELERATORS)}")
