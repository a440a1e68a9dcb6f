"""The student's output layer, cross-entropy and forward KL to sparse teacher targets; no logit is stored.

N positions, d hidden size, V student vocabulary, K kept ids of a position, T temperature. With logits
z = hidden @ weight.T the losses are those of `sparse_kl` (same letters there), position by position, and
`fused_linear_sparse_kl` also returns d(sum CE + gamma T^2 KL)/d hidden and /d weight: what
`pipeline.losses.sparse_kd_reference` and autograd give. Where `pipeline.losses.linear_sparse_kd` keeps the
logits of a chunk of positions, here a tile of them lives in registers and never in memory. For that they
are multiplied out twice, which is 8 N V d operations for 6; memory sees one number a logit, its gradient,
for `vocab_chunk` tokens at a time. Scratch, counted and not measured: some 12 N d and 50 N K bytes, and
N x vocab_chunk numbers of hidden's dtype, whatever V is.

1. `tail_lse` (kernels.py, launched in passes.py): a program takes some rows and one chunk of the vocabulary, and finds the maximum and the sums
   of the tail there, the rows' ids left out; on the way the logits of ids and label come off.
2. `finish_rows` (rows.py): CE, KL, the gradient at the ids, and off the ids one scalar of the row times
   exp(z - maximum). All of it is [N, K] and torch.
3. For each chunk, `chunk_gradient` multiplies the logits out again and stores their gradient, `put_ids`
   sets ids and label right, and two library products carry it on to d_hidden and d_weight.

The tail's log-sum-exp is a sum over the tail, never 1 minus the share of the ids, and so loses no digits on
a student who is sure of the ids: they are sorted, and as a program walks up its chunk each row walks up its
ids and takes them out of the tile.

Checked against float64 in Triton's interpreter, and compiled ahead of time for four targets
(`compile_gate`). Nothing here has run on a GPU: its speed, its races if any, and how accurate tf32x3 is
there are unknown.
"""

from ddk_pipe.triton_kernels.fused_linear_sparse_kl.kernels import chunk_gradient, put_ids, tail_lse
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.launches import (
    GROUP,
    LAUNCHES,
    PUTS,
    Launch,
    Put,
    tile_constants,
)
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.loss import fused_linear_sparse_kl

# All but the last are for `compile_gate`.
__all__ = [
    "GROUP",
    "LAUNCHES",
    "PUTS",
    "Launch",
    "Put",
    "chunk_gradient",
    "fused_linear_sparse_kl",
    "put_ids",
    "tail_lse",
    "tile_constants",
]
