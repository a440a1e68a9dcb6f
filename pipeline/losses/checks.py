"""What losses refuse at once: implementations that a problem does not have, shapes and devices that do not fit.

What is wrong with a row `losses/rows.py` says, what the options may be `Terms` knows.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip
from ddk_pipe.pipeline.losses.terms import Direction
from ddk_pipe.pipeline.targets import SparseTargets


def check_implementation(
    implementation: str, direction: Direction, skip: GradientSkip | None, device: torch.device
) -> None:
    """Raises ValueError for an unknown one, NotImplementedError for what it does not do."""
    if implementation not in ("auto", "chunked", "triton"):
        raise ValueError(f'implementation {implementation!r}: expected "auto", "chunked" or "triton"')
    if skip is not None and (implementation == "triton" or device.type != "cpu"):
        raise NotImplementedError(
            f'gradient_skip with implementation "{implementation}" on {device.type}: use "chunked" on a CPU'
        )
    if implementation != "triton":
        return
    if direction != "forward":
        raise NotImplementedError('implementation "triton" has forward KL only; use "chunked" for reverse')
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError('implementation "triton": triton is not installed; use "chunked"')


def check_states(hidden: Tensor, positions: int, labels: Tensor) -> None:
    """hidden [N, d] must have the N positions that rows were taken from, and lie where their labels do."""
    shape = list(hidden.shape)
    if hidden.ndim != 2 or len(hidden) != positions:
        raise ValueError(
            f"hidden has shape {shape}: expected [{positions}, d] (rows of {positions} positions)"
        )
    _check_device("rows", labels, "hidden", hidden)


def check_shapes(
    rows: Tensor,
    name: str,
    width: str,
    labels: Tensor,
    targets: SparseTargets | None,
) -> None:
    """rows [N, width], labels [N] and targets of N positions must agree, and lie on one device."""
    if rows.ndim != 2:
        raise ValueError(f"{name} has shape {list(rows.shape)}: expected [N, {width}]")
    check_targets(labels, targets, rows, name)


def check_targets(labels: Tensor, targets: SparseTargets | None, rows: Tensor, name: str) -> None:
    """labels [N] and targets must have a position for each of `rows` [N, ...], and lie where they do."""
    n, given = len(rows), f"{name} has shape {list(rows.shape)}"
    _check_shape("labels", labels, (n,), given)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: expected integers")
    parts = {"labels": labels}
    if targets is not None:
        if targets.ids.ndim != 2:
            raise ValueError(f"targets.ids has shape {list(targets.ids.shape)}: expected [{n}, K]")
        _check_shape("targets.ids", targets.ids, (n, targets.ids.shape[1]), given)
        _check_shape("targets.logprobs", targets.logprobs, tuple(targets.ids.shape), "ids alike")
        _check_shape("targets.tail", targets.tail, (n,), given)
        parts |= {"ids": targets.ids, "logprobs": targets.logprobs, "tail": targets.tail}
    for part, tensor in parts.items():
        _check_device(part, tensor, name, rows)


def check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """weight [V, d] and bias [V] must fit hidden [N, d]."""
    given = f"hidden has shape {list(hidden.shape)}"
    _check_shape("weight", weight, (*weight.shape[:1], hidden.shape[1]), given)
    if not weight.shape[0]:
        raise ValueError("weight has no rows: expected [V, d] with V > 0")
    _check_device("weight", weight, "hidden", hidden)
    if bias is not None:
        _check_shape("bias", bias, (weight.shape[0],), f"weight has shape {list(weight.shape)}")
        _check_device("bias", bias, "hidden", hidden)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], because: str) -> None:
    if tensor.shape != expected:
        found = list(tensor.shape)
        raise ValueError(f"{name} has shape {found}: expected {list(expected)} ({because})")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        here, there = tensor.device, other.device
        raise ValueError(f"{name} on {here}, {other_name} on {there}: move one with .to()")
