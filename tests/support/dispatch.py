"""What a piece of work asks of a device, counted on a CPU: waits of the host, and bytes that pass through memory.

    with Watch() as watch:
        ...
    assert not watch.waits

A wait is anything for which the host needs a number or a shape from the device. Operators are seen where torch
dispatches them, the ways of a tensor to the host that are no operators (`tolist`, `cpu`, `numpy`) where Python calls
them. On "meta" tensors, which hold no numbers, every wait raises too: the second net.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING_OPERATORS = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
WAITING_METHODS = {"tolist", "cpu", "numpy", "__array__"}
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# These touch what they are given an index for, and no more.
SPARSE = {"gather", "index", "index_copy_", "index_fill_", "index_put_", "index_select", "scatter_"}
WITHOUT_READING = {"copy_", "fill_", "zero_", "masked_fill_"}  # in place, and what was there does not matter


class Watch:
    """Counts while it is entered; `waits` names each wait, `bytes` adds up what large tensors cost.

    least  elements from which on a tensor's bytes count: of the logits of a chunk, say, and not of what a row has
    On a CPU, `mm` and `addmm` with a result wider than their operands are done here: it has none.
    """

    def __init__(self, least: int = 0) -> None:
        self.least, self.bytes, self.waits = least, 0, Counter[str]()
        self.by_operator = Counter[str]()
        self._paused = False
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        self._entered.enter_context(_Operators(self))
        self._entered.enter_context(_Methods(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """For what stands in for a kernel of other cost."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def add(self, name: str, count: int) -> None:
        """`count` bytes."""
        self.bytes += count
        self.by_operator[name] += count

    def saw(self, func: Any, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if self._paused:
            return
        if name in WAITING_OPERATORS or (name in BY_MASK and _has_mask(arguments)):
            self.waits[name] += 1
        if not func.is_view:
            self.add(name, self._traffic(func, name, arguments, named, result))

    def _traffic(
        self, func: Any, name: str, arguments: tuple[Any, ...], named: dict[str, Any], result: Any
    ) -> int:
        if name in SPARSE or name.startswith(("empty", "new_empty")):
            return 0
        read, written = [], tree_leaves(result)
        given = dict(zip((a.name for a in func._schema.arguments), arguments, strict=False)) | named
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if not (argument.is_out or (writes and name in WITHOUT_READING)):
                read += tree_leaves(given.get(argument.name))
        if name.startswith("new_") or name.endswith("_like"):
            read = []
        return sum(
            x.numel() * x.element_size()
            for x in (*read, *written)
            if isinstance(x, Tensor) and x.numel() >= self.least
        )


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        wide = func in _WIDE and args[0].device.type == "cpu"
        result = _wide_product(func, args, named) if wide else func(*args, **named)
        self.watch.saw(func, args, named, result)
        return result


class _Methods(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in WAITING_METHODS and not self.watch._paused:
            self.watch.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
_WIDE = (_aten.mm.dtype, _aten.mm.dtype_out, _aten.addmm.dtype, _aten.addmm.dtype_out)


def _wide_product(func: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What CUDA does: 16-bit operands, products added up in float32, the result as wide."""
    added = func in (_aten.addmm.dtype, _aten.addmm.dtype_out)
    start = 1 if added else 0
    a, b, dtype = arguments[start], arguments[start + 1], arguments[start + 2]
    product = a.to(dtype) @ b.to(dtype)
    if added:
        product = product + arguments[0]
    out: Tensor | None = named.get("out")
    return product if out is None else out.copy_(product)


def _has_mask(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(arguments[1]))
