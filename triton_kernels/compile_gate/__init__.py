"""Compiles every kernel in every launch that ships, for four targets, and refuses register spills. No GPU needed.

    python -P -m ddk_pipe.triton_kernels.compile_gate            check all
    python -P -m ddk_pipe.triton_kernels.compile_gate --write    a new table

The compiler alone decides registers, spills and shared memory, and triton's wheel brings all it needs (ptxas,
cuobjdump; LLVM for AMD), so a spill is found before anyone rents the GPU. `tables/` keeps the figures, which
depend on the compiler: a file for each version of triton that was tried, named after it.
A gate that never fires is no gate: some variants are known to spill, and have to. Kernels that multiply
matrices must do so on the matrix units, too.

What it cannot show: speed, races, wrong numbers. None of these kernels has run on a GPU.
"""

from ddk_pipe.triton_kernels.compile_gate.checks import complaints
from ddk_pipe.triton_kernels.compile_gate.figures import Row
from ddk_pipe.triton_kernels.compile_gate.program import main
from ddk_pipe.triton_kernels.compile_gate.variants import row_kernel, tile_kernel

__all__ = ["Row", "complaints", "main", "row_kernel", "tile_kernel"]
