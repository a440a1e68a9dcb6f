"""The output layer as the kernels want it, and how they are launched on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ddk_pipe.triton_kernels import tuning
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.launches import ALIGNED, LAUNCHES, Launch, tile_constants


class Layer(NamedTuple):
    """The product, as the kernels want it."""

    hidden: Tensor  # [n, d rounded up], the labelled rows
    weight: Tensor  # [V, d rounded up]
    width: int  # d
    inv_t: float
    chunk: int

    def run(self, name: str, launch: Callable[[Launch, dict[str, Any]], None]) -> None:
        """Launches a matrix kernel of that name: `launch` is given the tile and all constants, `num_warps` too."""
        gpu = gpu_of(self.hidden.device)
        constants = partial(tile_constants, gpu=gpu, temperature_1=self.inv_t == 1)

        def run(one: Launch) -> None:
            launch(one, {**constants(one), "num_warps": one.warps, "num_stages": one.stages})

        sizes = tuning.size_class(*self.hidden.shape, len(self.weight))
        key = (name, self.hidden.dtype, self.inv_t == 1, *sizes)
        launches = LAUNCHES[gpu, self.hidden.element_size()]
        run(tuning.pick(launches, key, lambda: run, self.hidden.device))


def gpu_of(device: torch.device) -> str:
    """Whose `LAUNCHES` a device takes; in the interpreter those of sm_90."""
    if torch.version.hip:
        return "gfx942"
    return "sm_80" if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0) else "sm_90"


def operand(x: Tensor) -> Tensor:
    """x [n, d], d and the distance of its rows made multiples of 16: itself, or a copy padded with zeros."""
    fits = x.shape[1] % ALIGNED == 0 and x.stride(1) == 1 and x.stride(0) % ALIGNED == 0
    if fits and x.data_ptr() % 16 == 0:  # which is in bytes, and what triton asks for
        return x
    padded = x.new_zeros(len(x), triton.cdiv(x.shape[1], ALIGNED) * ALIGNED)
    padded[:, : x.shape[1]] = x
    return padded
