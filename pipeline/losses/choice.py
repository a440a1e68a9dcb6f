"""Which implementation "auto" takes: the Triton kernel on the devices it is for, once it has been seen to be right.

The first loss of its kind on a device is preceded by a small problem (`losses/first_use.py`); where that comes out
wrong, or not at all, the chunked loss in torch does the work, and one warning says so.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Literal

import torch

from ddk_pipe.pipeline.losses import first_use
from ddk_pipe.pipeline.losses.terms import Direction, Terms

Implementation = Literal["auto", "chunked", "triton"]
Chosen = Literal["chunked", "triton"]

TRITON_DEVICES = frozenset({"cuda"})  # device types on which "auto" looks at the kernel at all
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_KEPT = 4096  # ids a row, of the kernel's widest launch


def chosen_implementation(
    device: torch.device,
    dtype: torch.dtype,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    softcap: float | None = None,
    kept: int = 64,
) -> Chosen:
    """What "auto" stands for: "triton" or "chunked", by which a run's record can name it.

    dtype  of the products' operands: the output layer's, or autocast's
    kept   K, ids a row
    The first call for a device, dtype, launch and whether T is 1 tries the kernel, if it is one for it: that waits for
    the device, once. Warns (RuntimeWarning) if the kernel is found wrong there.
    """
    if device.type not in TRITON_DEVICES or direction != "forward" or dtype not in TRITON_DTYPES:
        return "chunked"
    if kept > MOST_KEPT or not _triton_is_installed():
        return "chunked"
    logits = torch.float32 if softcap is not None else dtype
    return (
        "triton" if _is_right(device, dtype, logits, temperature == 1, kept > first_use.KEPT) else "chunked"
    )


def takes_triton(
    implementation: Implementation, device: torch.device, operand: torch.dtype, terms: Terms, kept: int
) -> bool:
    """Whether a loss is the kernel's; `implementation` was checked before."""
    if implementation != "auto":
        return implementation == "triton"
    chosen = chosen_implementation(
        device,
        operand,
        temperature=terms.temperature,
        direction=terms.direction,
        softcap=terms.softcap,
        kept=kept,
    )
    return chosen == "triton"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_right(
    device: torch.device, operand: torch.dtype, logits: torch.dtype, temperature_is_1: bool, wide: bool
) -> bool:
    """Whether the small problem comes out right; remembered until the process ends."""
    wrong = first_use.complaint(
        device,
        operand,
        logits,
        1.0 if temperature_is_1 else 2.0,
        2 * first_use.KEPT if wide else first_use.KEPT,
    )
    if wrong is not None:
        warnings.warn(
            f"the Triton loss is not used on {device} with {operand} operands: {wrong}; the chunked loss in torch runs"
            " in its place, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
    return wrong is None
