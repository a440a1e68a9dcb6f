"""The three products of an output layer: what their operands are rounded to, and results wider than the operands.

Results of 16-bit operands are float32 and rounded once: on `WIDENING_DEVICES` because the operands are widened, on
`WIDE_RESULT_DEVICES` because the library adds up in float32 and is asked for that. Elsewhere a product is 16-bit
before it is copied or added.

A trailing underscore in a name: writes into its first argument.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Devices that may multiply 16-bit matrices more slowly than float32: 8.7, not 49 GFLOP/s on AVX2.
WIDENING_DEVICES = frozenset({"cpu"})
# Devices with `torch.mm(..., out_dtype=torch.float32)` of 16-bit operands.
WIDE_RESULT_DEVICES = frozenset({"cuda"})


def operand_dtype(weight: Tensor) -> torch.dtype:
    """What the products' operands are rounded to: the weight's dtype, or autocast's if it is on."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def accumulator(operand: torch.dtype) -> torch.dtype:
    """Of softmax, sums and gradients."""
    return torch.float64 if operand == torch.float64 else torch.float32


def as_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to dtype, then widened where 16-bit products are worth avoiding."""
    x = x.to(dtype)
    return x.float() if dtype.itemsize < 4 and x.device.type in WIDENING_DEVICES else x


def multiply_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a @ b; out may be wider than the operands."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type in WIDE_RESULT_DEVICES:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b; out may be wider than the operands."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    if a.device.type not in WIDE_RESULT_DEVICES:
        return out.add_(torch.mm(a, b))
    if _adds_to_wide(a.device, a.dtype, out.dtype):
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))


@functools.cache
def _adds_to_wide(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether `torch.addmm(out_dtype=)` takes a matrix of the result's dtype: older versions want the operands'."""
    a, out = (torch.zeros(16, 16, device=device, dtype=kind) for kind in (dtype, wide))
    try:
        torch.addmm(out, a, a, out_dtype=wide, out=out)
    except (RuntimeError, TypeError):
        return False
    return True
