"""Cross-entropy and KL to sparse or dense targets without ever holding [positions, vocabulary], and what validation measures.

The float64 reference, dense and slow, is the truth that all the others are tested against.
"""

from ddk_pipe.pipeline.losses.chunked import linear_sparse_kd
from ddk_pipe.pipeline.losses.dense import DenseTargets, linear_dense_kd
from ddk_pipe.pipeline.losses.measures import N_SUMS, measure, summary, sums_by_confidence, target_entropy
from ddk_pipe.pipeline.losses.reference import sparse_kd_reference
from ddk_pipe.pipeline.losses.terms import SparseKdLoss

__all__ = [
    "N_SUMS",
    "DenseTargets",
    "SparseKdLoss",
    "linear_dense_kd",
    "linear_sparse_kd",
    "measure",
    "sparse_kd_reference",
    "summary",
    "sums_by_confidence",
    "target_entropy",
]
