"""What the gate refuses."""

from __future__ import annotations

from collections.abc import Iterable

from ddk_pipe.triton_kernels.compile_gate.figures import Row
from ddk_pipe.triton_kernels.compile_gate.signatures import KERNELS
from ddk_pipe.triton_kernels.compile_gate.targets import MOST_THREADS, TARGETS


def complaints(rows: Iterable[Row]) -> list[str]:
    """What is wrong with them, one sentence each. Empty: the gate is open."""
    found = []
    for row in rows:
        limit = TARGETS[row.variant.target].shared_bytes
        if row.variant.must_spill and not row.spill_bytes:
            found.append(
                f"{row.variant}: no longer spills; find another that does, and perhaps ship this one"
            )
        elif row.spill_bytes and not row.variant.must_spill:
            found.append(f"{row.variant}: spills {row.spill_bytes} bytes a thread")
        if KERNELS[row.variant.kernel].matrix and not row.matrix_instructions:
            found.append(f"{row.variant}: multiplies without matrix instructions")
        threads = row.variant.warps * TARGETS[row.variant.target].gpu.warp_size
        if threads > MOST_THREADS:
            found.append(f"{row.variant}: {threads} threads, a program may have {MOST_THREADS}")
        if row.shared_bytes > limit:
            found.append(f"{row.variant}: {row.shared_bytes} bytes of shared memory, the target has {limit}")
    return found
