"""What the launchers of this folder refuse, in one wording."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_matrix(name: str, x: Tensor, shape: str, last: str) -> None:
    """Raises ValueError unless x is a matrix of a float dtype the kernels take, with columns (`last` > 0)."""
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: shape {list(x.shape)}, expected {shape} with {last} > 0")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: {x.dtype}, expected float32, float16 or bfloat16")


def check_rows(
    name: str,
    rows: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    *more: tuple[str, Tensor, torch.dtype, tuple[int, ...]],
) -> None:
    """Raises ValueError unless labels and targets (and `more`) fit rows [N, .] in shape, dtype and device.

    labels int64 [N]; ids int32 [N, K]; logprobs float32 [N, K]; tail float32 [N]; more: (name, tensor, its dtype,
    its shape)
    """
    if ids.ndim != 2:
        raise ValueError(f"ids: shape {list(ids.shape)}, expected [N, K]")
    n = rows.shape[0]
    given = f"{name} has shape {list(rows.shape)}"
    wanted: Iterable[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = (
        *more,
        ("labels", labels, torch.int64, (n,)),
        ("ids", ids, torch.int32, (n, ids.shape[1])),
        ("logprobs", logprobs, torch.float32, (n, ids.shape[1])),
        ("tail", tail, torch.float32, (n,)),
    )
    for part, tensor, dtype, shape in wanted:
        if tensor.shape != shape:
            raise ValueError(f"{part}: shape {list(tensor.shape)}, expected {list(shape)} ({given})")
        if tensor.dtype != dtype:
            raise ValueError(f"{part}: {tensor.dtype}, expected {dtype}")
        if tensor.device != rows.device:
            raise ValueError(f"{part} on {tensor.device}, {name} on {rows.device}: move one with .to()")


def check_device(name: str, x: Tensor, kernel: Any) -> None:
    """Raises ValueError for CPU tensors outside the interpreter."""
    if x.device.type == "cpu" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{name} on the CPU: move to a GPU, or set TRITON_INTERPRET=1 before triton is imported"
            " (slow, for tests)"
        )


def check_numbers(gamma: float, temperature: float) -> None:
    """Raises ValueError unless gamma >= 0 and temperature > 0, both finite."""
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma {gamma}: expected a finite number >= 0")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature}: expected a finite number > 0")
