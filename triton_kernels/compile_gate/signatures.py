"""What is compiled: the kernels, and their arguments as a launch types them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddk_pipe.triton_kernels import fused_linear_sparse_kl as fused
from ddk_pipe.triton_kernels.sparse_kl import sparse_kl_rows


@dataclass(frozen=True)
class Kernel:
    """A kernel and its arguments as a launch types them."""

    function: Any
    types: str  # "NAME:type ...", where "*T" points to the dtype of a variant; int32 if not named
    multiples_of_16: str  # what is one, as are all pointers: torch aligns what it allocates
    matrix: bool = False  # multiplies matrices


KERNELS = {
    "sparse_kl_rows": Kernel(
        sparse_kl_rows,
        "Z:*T LABELS:*i64 IDS:*i32 LOG_W:*fp32 LOG_TAIL:*fp32 CE:*fp32 KL:*fp32 kl_slope:fp32 inv_t:fp32",
        "stride V",  # unless the variant is not `aligned`
    ),
    "tail_lse": Kernel(
        fused.tail_lse,
        "H:*T W:*T LABELS:*i32 IDS:*i32 FIRST:*i32 Z_IDS:*fp32 Z_LABEL:*fp32 TOP:*fp32 TOTAL:*fp32"
        " TOTAL_T:*fp32 inv_t:fp32",
        "D stride_h stride_w",
        matrix=True,
    ),
    "chunk_gradient": Kernel(
        fused.chunk_gradient,
        "H:*T W:*T TOP:*fp32 CE_SCALE:*fp32 KL_SCALE:*fp32 G:*T inv_t:fp32",
        "D stride_h stride_w stride_g",
        matrix=True,
    ),
    "put_ids": Kernel(fused.put_ids, "G:*T IDS:*i32 AT_IDS:*fp32 LABELS:*i32 AT_LABEL:*fp32", "stride_g"),
}
