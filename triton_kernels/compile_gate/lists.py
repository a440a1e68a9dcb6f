"""Which variants: all that ships, and a few that have to spill."""

from __future__ import annotations

from ddk_pipe.triton_kernels import fused_linear_sparse_kl as fused
from ddk_pipe.triton_kernels.compile_gate.variants import (
    Variant,
    puts_of,
    row_kernel,
    rows_of,
    tile_kernel,
    tiles_of,
)
from ddk_pipe.triton_kernels.sparse_kl import LAUNCHES

# Of a list of launches: what is taken unless `tuning` is on, and the rest.
DEFAULT, TUNED = slice(1), slice(1, None)


def shipped() -> list[Variant]:
    """What runs as a rule: the default launches in bfloat16 and float32, what tuning may choose in bfloat16.

    Only at T != 1, which needs more registers; the default rows at both.
    """
    dtypes = ("bf16", "fp32")
    found = [variant for launches in LAUNCHES for variant in rows_of(launches[0], dtypes)]
    found += [
        variant for launches in LAUNCHES for variant in rows_of(launches[0], dtypes, temperature_1=True)
    ]
    found += [
        variant
        for launches in LAUNCHES
        for launch in launches[TUNED]
        for variant in rows_of(launch, ["bf16"])
    ]
    found += [*tiles_of(DEFAULT, dtypes), *tiles_of(TUNED, ["bf16"]), *puts_of(fused.PUTS[0], dtypes)]
    return found


def unusual() -> list[Variant]:
    """All else that ships: float16, tiles at T = 1, V that is no multiple of 16 (50257, say), the loss alone.

    The fused kernels know neither of the last two: what they are given is aligned, and both of them run.
    """
    dtypes = ("bf16", "fp32", "fp16")
    found = []
    for launches in LAUNCHES:
        for launch in launches:
            for one in (True, False):
                found += rows_of(launch, dtypes, temperature_1=one, rare=True)
                found += rows_of(launch, dtypes[:2], temperature_1=one, aligned=False, rare=True)
            found += rows_of(launch, dtypes[:2], gradient=False, rare=True)
    for one in (True, False):
        found += tiles_of(slice(None), dtypes, temperature_1=one, rare=True)
    for put in fused.PUTS:
        found += puts_of(put, dtypes, rare=True)
    common = {str(variant) for variant in shipped()}
    return [variant for variant in found if str(variant) not in common]


# Launches too greedy for their target, of each kind of kernel one for each of the two compilers.
KNOWN_SPILLERS = [
    row_kernel("sm_90", "bf16", 256, 16384, 4, temperature_1=False, must_spill=True),
    row_kernel("gfx942", "bf16", 256, 32768, 4, temperature_1=False, must_spill=True),
    tile_kernel(
        "tail_lse", "sm_80", "fp32", fused.Launch(128, 128, 32, 8, 3), temperature_1=False, must_spill=True
    ),
    tile_kernel(
        "tail_lse", "gfx942", "bf16", fused.Launch(128, 128, 64, 4, 2), temperature_1=False, must_spill=True
    ),
]
