"""Which tiles the kernels take: plain numbers, no triton."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """The tile of logits of one program, and how its product is fed."""

    rows: int
    columns: int
    depth: int  # numbers of a hidden state in one step of the product
    warps: int
    stages: int


class Put(NamedTuple):
    """How `put_ids` goes over the ids of a row."""

    block: int
    warps: int


# By triton's name of the backend and the bytes of an operand: the default, then what `tuning` may choose
# instead. None of them spills on any target of `compile_gate`: on gfx942 tiles of 128 x 128 would, and so
# would float32 on sm_80 at a depth of 32. Which is fastest, nobody can say before they run on a GPU.
LAUNCHES: dict[tuple[str, int], tuple[Launch, ...]] = {
    ("cuda", 2): (
        Launch(128, 128, 64, warps=8, stages=3),
        Launch(128, 64, 64, warps=8, stages=4),
        Launch(128, 128, 32, warps=8, stages=3),
    ),
    ("cuda", 4): (
        Launch(128, 64, 16, warps=8, stages=3),
        Launch(128, 32, 16, warps=8, stages=3),
        Launch(64, 64, 16, warps=4, stages=3),
    ),
    ("hip", 2): (
        Launch(128, 64, 64, warps=8, stages=2),
        Launch(64, 128, 64, warps=8, stages=2),
        Launch(64, 64, 64, warps=4, stages=2),
    ),
    ("hip", 4): (
        Launch(128, 64, 32, warps=8, stages=2),
        Launch(64, 64, 32, warps=4, stages=2),
        Launch(128, 64, 16, warps=8, stages=2),
    ),
}
PUTS: tuple[Put, ...] = (Put(block=128, warps=4), Put(block=64, warps=2))
# float32 operands: the matrix units of NVIDIA take tf32, and three such products make up for the lost digits.
PRECISIONS: dict[str, str] = {"cuda": "tf32x3", "hip": "ieee"}
GROUP = 8  # `chunk_gradient`: so many blocks of rows share a block of the weight while it is in the cache
ALIGNED = 16  # d and all strides are multiples of it; without, loads are narrow and most launches spill


def tile_constants(launch: Launch, backend: str, temperature_1: bool) -> dict[str, Any]:
    """The constants that `tail_lse` and `chunk_gradient` share."""
    return {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
        "T_IS_1": temperature_1,
        "PRECISION": PRECISIONS[backend],
    }
