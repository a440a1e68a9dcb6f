"""Cross-entropy and KL to sparse or dense targets without ever holding [positions, vocabulary], and what validation measures.

The float64 reference, dense and slow, is the truth that all the others are tested against.
"""

from ddk_pipe.pipeline.losses.choice import chosen_implementation
from ddk_pipe.pipeline.losses.chunked import linear_sparse_kd, rows_sparse_kd
from ddk_pipe.pipeline.losses.dense import DenseTargets, linear_dense_kd
from ddk_pipe.pipeline.losses.measures import (
    N_SUMS,
    measure,
    measure_rows,
    summary,
    sums_by_confidence,
    target_entropy,
)
from ddk_pipe.pipeline.losses.reference import sparse_kd_reference
from ddk_pipe.pipeline.losses.rows import LabelledRows, labelled_rows
from ddk_pipe.pipeline.losses.terms import Direction, SparseKdLoss

__all__ = [
    "N_SUMS",
    "DenseTargets",
    "Direction",
    "LabelledRows",
    "SparseKdLoss",
    "chosen_implementation",
    "labelled_rows",
    "linear_dense_kd",
    "linear_sparse_kd",
    "measure",
    "measure_rows",
    "rows_sparse_kd",
    "sparse_kd_reference",
    "summary",
    "sums_by_confidence",
    "target_entropy",
]
