"""Counts, on a CPU, the operations for which the host would wait for a device: those that tell it a number or a size."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# sizes or values that depend on what a tensor holds
WAITS = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # by a mask: its nonzero first


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [index for index in args[1] if _is_mask(index)] if name in INDEXED else []
        if name in WAITS or masks:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class _Called(TorchFunctionMode):
    """tolist() reads a CPU's memory without an operation."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            self.counts["tolist"] += 1
        return func(*args, **(kwargs or {}))


class Waits:
    """`with Waits() as waits: ...`: how often each operation came, in `waits.counts`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Called(self.counts))
        self._modes.enter_context(_Dispatched(self.counts))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    @property
    def total(self) -> int:
        return self.counts.total()
