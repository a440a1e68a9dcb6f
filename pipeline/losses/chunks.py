"""The sums and gradients of an output layer's loss, one chunk of positions at a time.

The logits of a chunk (`CPU_LOGIT_BYTES`, `DEVICE_LOGIT_BYTES`) are float32, or float64 for float64 operands; the row
kernel takes them in the operands' own dtype, rounded once as a layer's output is, and writes the gradient back in it.
Under a soft cap they are float32 there too: tanh of a rounded logit would be rounded again, and its slope with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip
from ddk_pipe.pipeline.losses.logit_gradient import loss_and_gradient_, soft_cap_, triton_loss_and_gradient_
from ddk_pipe.pipeline.losses.products import accumulator, add_product_, as_operand, multiply_
from ddk_pipe.pipeline.losses.rows import LabelledRows
from ddk_pipe.pipeline.losses.terms import Terms

# The logits of one chunk take at most this much, as much again when T != 1 in torch, and with a softcap. On a CPU
# (N = 2048, V = 49152, d = 576, one thread) 32, 44, 48 MiB take 4.1, 3.9, 3.9 s (the product that forms the
# logits runs at 79, 83, 85 GFLOP/s), and peak memory is 0.130, 0.140, 0.144 of full cross-entropy's: dweight and
# dhidden alone are 0.097. With gradient_skip that product is most of the time: 32, 64 MiB take 1.85, 1.73 s.
# A GPU needs more, or reading and writing dweight once a chunk dominates: 4,096 rows of 131,072 16-bit logits.
CPU_LOGIT_BYTES, CPU_SKIP_LOGIT_BYTES = 44 * 2**20, 64 * 2**20
DEVICE_LOGIT_BYTES = 2**30
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 4096

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden [n, d], weight [V, d], bias [V]


def sums_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: LabelledRows,
    terms: Terms,
    operand: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """The sums of CE and KL, and the gradients of total that are `wanted`; all in the accumulator's dtype.

    hidden [N, d], weight [V, d], bias [V] or None, rounded to `operand`; dhidden is that of the labelled rows.
    """
    wide, n = accumulator(operand), len(rows)
    # Rows without a label go first: 0 * NaN is NaN, so a product would carry them into dweight.
    h = as_operand(hidden if n == len(hidden) else hidden.index_select(0, rows.live), operand)
    w = as_operand(weight, operand)
    b = None if bias is None else as_operand(bias, operand)
    # The first chunk writes dweight and the others add to it; sparse gradients are only ever added.
    fresh = h.new_empty if n and terms.skip is None else h.new_zeros
    of_hidden = h.new_empty(h.shape, dtype=wide) if wanted[0] else None
    of_weight = fresh(w.shape, dtype=wide) if wanted[1] else None
    of_bias = h.new_zeros(len(w), dtype=wide) if wanted[2] else None
    chunks = _Chunks(rows, h, w, b, terms, any(wanted))
    ce, kl = h.new_empty(2, n, dtype=wide)
    for part in chunks.parts:
        ce[part], kl[part], dz = chunks.loss(h[part], rows.rows(part))
        if of_bias is not None:
            of_bias.add_(dz.sum(0, dtype=wide))
        into = None if of_hidden is None else of_hidden[part]
        _products_(into, of_weight, dz.to(h.dtype), h[part], w, terms.skip, first=part.start == 0)
    return ce.sum(), kl.sum(), (of_hidden, of_weight, of_bias)


class _Chunks:
    """How positions are cut into chunks, and the memory that all chunks of a loss use in turn."""

    def __init__(
        self,
        of: LabelledRows,
        h: Tensor,
        w: Tensor,
        b: Tensor | None,
        terms: Terms,
        want_gradient: bool,
    ) -> None:
        self.w, self.b, self.terms, self.want_gradient = w, b, terms, want_gradient
        wide, vocab, n = accumulator(h.dtype), len(w), len(of)
        dtype = h.dtype if terms.by_triton and terms.softcap is None else wide
        rows = _chunk_rows(n, vocab * dtype.itemsize, _logit_bytes(h.device, terms))
        self.parts = [slice(start, min(start + rows, n)) for start in range(0, n, max(rows, 1))]
        self.flat = h.new_empty(rows * vocab + 1, dtype=dtype)
        two_softmaxes = terms.temperature != 1 and of.ids.numel() > 0 and not terms.by_triton
        self.softened = h.new_empty(rows, vocab, dtype=dtype) if two_softmaxes else None
        sloped = terms.softcap is not None and want_gradient
        self.slopes = h.new_empty(rows, vocab, dtype=dtype) if sloped else None

    def loss(self, h: Tensor, rows: LabelledRows) -> tuple[Tensor, Tensor, Tensor]:
        """CE [n] and KL [n] of some rows, and, until the next call, the gradient of their logits [n, V]."""
        flat = self.flat[: len(h) * len(self.w) + 1]
        z = flat[:-1].view(len(h), -1)
        self._logits_(z, h)
        slope = None if self.slopes is None else self.slopes[: len(h)]
        if self.terms.softcap is not None:
            soft_cap_(z, self.terms.softcap, slope)
        if self.terms.by_triton:
            ce, kl = triton_loss_and_gradient_(z, rows, self.terms, self.want_gradient)
        else:
            ce, kl = loss_and_gradient_(flat, rows, self.terms, self.softened, self.want_gradient)
        return ce, kl, z if slope is None else z.mul_(slope)

    def _logits_(self, z: Tensor, h: Tensor) -> None:
        if self.b is not None and z.dtype.itemsize < 4:  # inside the product, so that it is rounded once
            torch.addmm(self.b, h, self.w.t(), out=z)
            return
        multiply_(z, h, self.w.t())
        if self.b is not None:
            z.add_(self.b)


def _products_(
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    dz: Tensor,
    h: Tensor,
    w: Tensor,
    skip: GradientSkip | None,
    *,
    first: bool,
) -> None:
    """The share of one chunk: dz [n, V] is d total / d logits, h [n, d] its hidden states.

    d_hidden [n, d] is the chunk's own and written, d_weight [V, d] written by the first chunk and added to by others.
    """
    wanted = d_hidden is not None or d_weight is not None
    if skip is not None and wanted and skip.pays(dz):
        survivors = skip.draw(dz)
        if d_hidden is not None:
            d_hidden.copy_(survivors.times(w))
        if d_weight is not None:
            survivors.add_transposed_times_(d_weight, h)
        return
    if d_hidden is not None:
        multiply_(d_hidden, dz, w)
    if d_weight is not None:
        (multiply_ if first else add_product_)(d_weight, dz.t(), h)


def _logit_bytes(device: torch.device, terms: Terms) -> int:
    """The memory bound of one chunk's logits."""
    if device.type != "cpu":
        return DEVICE_LOGIT_BYTES
    return CPU_LOGIT_BYTES if terms.skip is None else CPU_SKIP_LOGIT_BYTES


def _chunk_rows(n: int, row_bytes: int, bound: int) -> int:
    """Rows of a chunk: as many as the memory bound allows, evened out so that no rest is small."""
    most = min(max(bound // row_bytes, MIN_CHUNK_ROWS), MAX_CHUNK_ROWS)
    chunks = math.ceil(n / most)
    return math.ceil(n / chunks) if chunks else 0
