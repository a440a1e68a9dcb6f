"""Which launch of a kernel is taken: the safe one, or, where tuning is switched on, the fastest one measured.

Every kernel ships a few launches, all of which `compile_gate` compiles without a spill for every target; the
first of them is the default. DDK_TRITON_TUNE=1, read when this module is imported, lets the first call of each
class of shapes time them all on its own arguments and keeps the fastest until the process ends. It is off by
default, since launches add up in different orders: results would depend on what was fastest that day, and ranks
could differ. In the interpreter, and on CPU tensors altogether, nothing is timed.

Never run on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

TUNE = os.environ.get("DDK_TRITON_TUNE") == "1"

Launch = TypeVar("Launch")
_fastest: dict[Hashable, int] = {}


def pick(
    launches: Sequence[Launch],
    shape_class: Hashable,
    trial: Callable[[], Callable[[Launch], object]],
    device: torch.device,
) -> Launch:
    """The first of `launches`, or the fastest for this kernel and class of shapes.

    shape_class  names the kernel, its dtype and its sizes, coarsely (`size_class`)
    trial        called if something is to be timed; returns what runs the kernel with a launch, as often as wanted
    """
    if not TUNE or device.type == "cpu" or len(launches) == 1:
        return launches[0]
    key = (device, shape_class)
    if key not in _fastest:
        run = trial()
        times = [_milliseconds(run, launch) for launch in launches]
        _fastest[key] = times.index(min(times))
    return launches[_fastest[key]]


def size_class(*sizes: int) -> tuple[int, ...]:
    """Sizes rounded up to powers of two: nearby shapes share one choice."""
    return tuple(max(size - 1, 0).bit_length() for size in sizes)


def _milliseconds(run: Callable[[Launch], object], launch: Launch) -> float:
    from triton.testing import do_bench

    return float(do_bench(lambda: run(launch)))
