"""One compiled form of a kernel, and the forms that a launch has on all targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ddk_pipe.triton_kernels import fused_linear_sparse_kl as fused
from ddk_pipe.triton_kernels.compile_gate.targets import DTYPES, TARGETS
from ddk_pipe.triton_kernels.sparse_kl import Launch


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel."""

    kernel: str
    target: str
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int | None = None  # None: what triton takes by itself
    aligned: bool = True  # V and the row stride are multiples of 16, so that loads are wide
    must_spill: bool = False
    rare: bool = False  # the tests leave it to main()

    def __str__(self) -> str:
        constants = (f"{name}={value}" for name, value in self.constants.items())
        return " ".join(
            [
                f"{self.kernel} {self.target} {self.dtype} w{self.warps}",
                *([] if self.stages is None else [f"s{self.stages}"]),
                *constants,
                *([] if self.aligned else ["unaligned"]),
                *(["must spill"] if self.must_spill else []),
            ]
        )


def row_kernel(
    target: str, dtype: str, kept: int, block: int, warps: int, temperature_1: bool, **rest: Any
) -> Variant:
    """A form of sparse_kl_rows; `rest` are other fields of the variant, and gradient=False."""
    gradient = rest.pop("gradient", True)
    constants = {"KEPT": kept, "BLOCK": block, "T_IS_1": temperature_1, "GRADIENT": gradient}
    return Variant("sparse_kl_rows", target, dtype, constants, warps, **rest)


def tile_kernel(
    kernel: str, target: str, dtype: str, launch: fused.Launch, temperature_1: bool, **rest: Any
) -> Variant:
    """A form of tail_lse or chunk_gradient; `rest` are other fields of the variant."""
    constants = fused.tile_constants(launch, TARGETS[target].launches, temperature_1)
    if kernel == "chunk_gradient":
        constants["GROUP"] = fused.GROUP
    return Variant(kernel, target, dtype, constants, launch.warps, launch.stages, **rest)


def rows_of(launch: Launch, dtypes: Iterable[str], **rest: Any) -> list[Variant]:
    """One launch of sparse_kl_rows on every target, T != 1 unless said otherwise."""
    rest = {"temperature_1": False, **rest}
    return [
        row_kernel(target, dtype, launch.kept, launch.block(DTYPES[dtype]), launch.warps, **rest)
        for target in TARGETS
        for dtype in dtypes
    ]


def tiles_of(which: slice, dtypes: Iterable[str], **rest: Any) -> list[Variant]:
    """Those launches of tail_lse and chunk_gradient on every target, T != 1 unless said otherwise."""
    rest = {"temperature_1": False, **rest}
    return [
        tile_kernel(kernel, target, dtype, launch, **rest)
        for kernel in ("tail_lse", "chunk_gradient")
        for target in TARGETS
        for dtype in dtypes
        for launch in fused.LAUNCHES[TARGETS[target].launches, DTYPES[dtype].itemsize][which]
    ]


def puts_of(put: fused.Put, dtypes: Iterable[str], **rest: Any) -> list[Variant]:
    """One launch of put_ids on every target."""
    return [
        Variant("put_ids", target, dtype, {"BLOCK": put.block}, put.warps, **rest)
        for target in TARGETS
        for dtype in dtypes
    ]
