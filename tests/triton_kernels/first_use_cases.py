"""The path that "auto" takes on CUDA, in Triton's interpreter: prints {case: finding}.

Run by test_linear_sparse_kd.py as `TRITON_INTERPRET=1 python -P first_use_cases.py`. The CPU is given what CUDA has:
16-bit products with float32 results (inside `dispatch.Watch`).
"""

from __future__ import annotations

import json
from typing import Any

import torch
from dispatch import Watch
from loss_cases import dense, linear, make_case, relative, replaced

from ddk_pipe.pipeline.losses import choice, first_use, products

CPU = torch.device("cpu")
products.WIDENING_DEVICES = frozenset()
products.WIDE_RESULT_DEVICES = frozenset({"cpu"})
choice.TRITON_DEVICES = frozenset({"cpu"})


def complaints(dtype: torch.dtype) -> dict[str, str | None]:
    """Of the small problem, with either launch and temperature."""
    first_use.ROWS = 4  # of 16, for time
    return {
        f"{dtype} T={temperature} kept={kept}": first_use.complaint(CPU, dtype, dtype, temperature, kept)
        for temperature, kept in ((1.0, first_use.KEPT), (2.0, first_use.KEPT), (1.0, 2 * first_use.KEPT))
    }


def errors(dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors of the loss that "auto" takes, and which that is."""
    case = replaced(make_case("topk", scale=0.5), dtype)
    want, want_gradients = dense(case, gamma=0.7)
    got, gradients = linear(case, dtype, gamma=0.7)
    return {
        "chosen": choice.chosen_implementation(CPU, dtype, kept=5),
        "total": relative(got.total, want.total),
        "gradients": max(relative(a, b) for a, b in zip(gradients, want_gradients, strict=True)),
    }


if __name__ == "__main__":
    with Watch():
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        found: dict[str, Any] = {str(dtype): errors(dtype) for dtype in dtypes}
        for dtype in dtypes:
            found |= complaints(dtype)
    print(json.dumps(found))
