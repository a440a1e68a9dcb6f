"""The machine: CPU threads, the allocator, devices and number types. Imports torch only inside functions."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from ddk_pipe.pipeline.errors import DdkError

if TYPE_CHECKING:
    import torch

# glibc's mallopt parameters (malloc.h)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 << 20
SPREAD = ("balanced", "sequential")  # a model over all GPUs, as transformers calls it
# A process in which torch has asked CUDA for its devices cannot fork one that uses them, and vLLM forks its engine.
# torch asks NVML in its place, and vLLM starts its processes afresh.
BEFORE_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def prepare_cpu() -> None:
    """Settings that make torch on a CPU up to three times faster; call before torch is imported.

    Worker threads sleep between parallel regions in place of spinning (spinning starves the other core when
    machines are shared), and freed memory is kept for the next step: otherwise every large tensor is mapped and
    faulted in anew. What the user has set in the environment wins. GPUs are not touched (`before_cuda`).
    """
    before_cuda()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc (musl): its allocator has no such knobs
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, TOP_PAD_BYTES)


def before_cuda() -> None:
    """Settings that must be there before torch is first asked for a GPU; what the user has set wins."""
    for name, value in BEFORE_CUDA.items():
        os.environ.setdefault(name, value)


def pick_device(name: str) -> str:
    """`auto` and the ways to spread become cuda where there is one; raises DdkError for a GPU that is not there."""
    import torch

    before_cuda()  # of a program that calls us, and not prepare_cpu
    if name == "auto" or name in SPREAD:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DdkError(f"device {name}: this machine has no CUDA device", hint="set device: auto")
    return name


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU, float32 on a CPU (bf16 matrix products are slower there)."""
    import torch

    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def peak_memory_bytes() -> int:
    """Largest resident size this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
