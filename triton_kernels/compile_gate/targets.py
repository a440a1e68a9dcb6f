"""What is compiled for: four GPUs and their limits, three dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    gpu: Any  # GPUTarget
    shared_bytes: int  # what one program may use; the compiler does not check it
    launches: str  # whose launches of the fused kernels it takes


MOST_THREADS = 1024  # of a program, on all of them; the compiler does not check it either

TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, "sm_80"),  # A100
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, "sm_90"),  # H100, H200
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, "sm_90"),  # B200
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, "gfx942"),  # MI300
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
