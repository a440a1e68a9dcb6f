"""Logits in float32 of a teacher in 16 bits: its output layer would round them, by 0.06 at 25, 6% of a probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError

HALVES = (torch.bfloat16, torch.float16)
OTHERWISE = "set teacher.logits: model (in the engine's own precision)"


def widens(options: manifest.Teacher, dtype: torch.dtype) -> bool:
    """True where the output layer's products are to be kept in float32 and the model's dtype would round them."""
    return options.logits == "float32" and dtype in HALVES


def widen(layer: Any) -> None:
    """Let an output layer, a plain torch.nn.Linear in 16 bits, return float32 [..., V] and round nothing.

    Raises DdkError for a layer of another kind (quantised): whether and how it rounds is its own.
    """
    plain = isinstance(layer, torch.nn.Linear) and layer.weight.dtype in HALVES
    if not plain or type(layer.weight.data) is not Tensor:
        raise DdkError(
            f"teacher.logits: float32 is not to be had of this teacher's output layer ({type(layer).__name__})",
            hint=OTHERWISE,
        )

    def forward(states: Tensor) -> Tensor:
        return product(states.to(layer.weight.device), layer.weight, layer.bias)

    layer.forward = forward


def product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """states [..., d] and weight [V, d] in 16 bits -> states @ weight.T + bias, float32 [..., V].

    On CUDA the operands stay as they are; elsewhere they are widened first, for there is no such product.
    """
    if states.device.type != "cuda":
        return functional.linear(states.float(), weight.float(), None if bias is None else bias.float())
    logits = torch.mm(states.flatten(0, -2), weight.t(), out_dtype=torch.float32)
    if bias is not None:
        logits += bias
    return logits.view(*states.shape[:-1], -1)
