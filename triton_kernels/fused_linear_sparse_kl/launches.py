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


# By the first GPU that they are for and the bytes of an operand: the default, then what `tuning` may choose
# instead. None of them spills on any target of `compile_gate` under any triton that it has a table of. Left out for
# that: tiles of 128 x 128 on gfx942, float32 at a depth of 32 on sm_80; and there, under triton 3.7 alone and by a
# dozen registers, 128 x 128 x 64 and in float32 128 x 32 x 16. Which is fastest, nobody can say before they run on
# a GPU.
LAUNCHES: dict[tuple[str, int], tuple[Launch, ...]] = {
    ("sm_80", 2): (
        Launch(128, 128, 32, warps=8, stages=3),
        Launch(128, 64, 64, warps=8, stages=4),
    ),
    ("sm_80", 4): (
        Launch(128, 64, 16, warps=8, stages=3),
        Launch(64, 64, 16, warps=4, stages=3),
    ),
    ("sm_90", 2): (
        Launch(128, 128, 64, warps=8, stages=3),
        Launch(128, 64, 64, warps=8, stages=4),
        Launch(128, 128, 32, warps=8, stages=3),
    ),
    ("sm_90", 4): (
        Launch(128, 64, 16, warps=8, stages=3),
        Launch(128, 32, 16, warps=8, stages=3),
        Launch(64, 64, 16, warps=4, stages=3),
    ),
    ("gfx942", 2): (
        Launch(128, 64, 64, warps=8, stages=2),
        Launch(64, 128, 64, warps=8, stages=2),
        Launch(64, 64, 64, warps=4, stages=2),
    ),
    ("gfx942", 4): (
        Launch(128, 64, 32, warps=8, stages=2),
        Launch(64, 64, 32, warps=4, stages=2),
        Launch(128, 64, 16, warps=8, stages=2),
    ),
}
PUTS: tuple[Put, ...] = (Put(block=128, warps=4), Put(block=64, warps=2))
# float32 operands: the matrix units of NVIDIA take tf32, and three such products make up for the lost digits.
PRECISIONS: dict[str, str] = {"sm_80": "tf32x3", "sm_90": "tf32x3", "gfx942": "ieee"}
GROUP = 8  # `chunk_gradient`: so many blocks of rows share a block of the weight while it is in the cache
ALIGNED = 16  # d and all strides are multiples of it; without, loads are narrow and most launches spill


def tile_constants(launch: Launch, gpu: str, temperature_1: bool) -> dict[str, Any]:
    """The constants that `tail_lse` and `chunk_gradient` share."""
    return {
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
        "T_IS_1": temperature_1,
        "PRECISION": PRECISIONS[gpu],
    }
