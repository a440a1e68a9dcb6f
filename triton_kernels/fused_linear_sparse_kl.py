"""The student's output layer, cross-entropy and forward KL to sparse teacher targets; no logit is stored.

N positions, d hidden size, V student vocabulary, K kept ids of a position, T temperature. With logits
z = hidden @ weight.T the losses are those of `sparse_kl` (same letters there), position by position, and
`fused_linear_sparse_kl` also returns d(sum CE + gamma T^2 KL)/d hidden and /d weight: what
`pipeline.losses.sparse_kd_reference` and autograd give. Where `pipeline.losses.linear_sparse_kd` keeps the
logits of a chunk of positions, here a tile of them lives in registers and never in memory. For that they
are multiplied out twice, which is 8 N V d operations for 6; memory sees one number a logit, its gradient,
for `vocab_chunk` tokens at a time. Scratch, counted and not measured: some 12 N d and 50 N K bytes, and
N x vocab_chunk numbers of hidden's dtype, whatever V is.

1. `tail_lse`: a program takes some rows and one chunk of the vocabulary, and finds the maximum and the sums
   of the tail there, the rows' ids left out; on the way the logits of ids and label come off.
2. `_finish_rows`: CE, KL, the gradient at the ids, and off the ids one scalar of the row times
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

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddk_pipe.triton_kernels import arguments, tuning

LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum of nothing that may be subtracted from -inf
# Among the sorted ids: padding and what is outside the vocabulary, last in the row.
NO_TOKEN = tl.constexpr(2**31 - 1)


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


@triton.jit
def _logits(H, W, row, column, N, end, D, stride_h, stride_w, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of H @ W.T, float32; zeros beyond N and `end`."""
    h = H + row[:, None].to(tl.int64) * stride_h  # widened first: N d and V d may pass 2^31
    w = W + column[None, :].to(tl.int64) * stride_w
    z = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, D, DEPTH):
        at = start + tl.arange(0, DEPTH)
        left = tl.load(h + at[None, :], mask=(row < N)[:, None] & (at < D)[None, :], other=0.0)
        right = tl.load(w + at[:, None], mask=(column < end)[None, :] & (at < D)[:, None], other=0.0)
        z = tl.dot(left, right, z, input_precision=PRECISION)
    return z


@triton.jit
def _is_at(z, wanted):
    """Where the wanted column of each row is in the tile z; counted from its left edge, to save registers."""
    return tl.arange(0, z.shape[1])[None, :] == wanted[:, None]


@triton.jit(do_not_specialize=["N", "V", "K", "chunk"])
def tail_lse(
    H,  # [N, d], rows `stride_h` apart
    W,  # [V, d], rows `stride_w` apart
    LABELS,  # int32 [N], -1 outside the vocabulary
    IDS,  # int32 [N, K], ascending, NO_TOKEN last
    FIRST,  # int32 [chunks, N]: the row's first slot whose id is not below the chunk
    Z_IDS,  # float32 [N, K], written where the id is a token
    Z_LABEL,  # float32 [N], written where the label is a token
    TOP,  # float32 [chunks, N], written: the maximum of the chunk's logits off the ids
    TOTAL,  # float32 [chunks, N], written: sum of exp(z - TOP)
    TOTAL_T,  # float32 [chunks, N], written unless T_IS_1: sum of exp((z - TOP) / T)
    N,
    V,
    D,
    K,
    stride_h,
    stride_w,
    chunk,
    inv_t,  # 1 / T
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    T_IS_1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = row.to(tl.int64)
    real = row < N
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, V)
    out = tl.program_id(1).to(tl.int64) * N + row
    label = tl.load(LABELS + row, mask=real, other=-1)
    slot = tl.load(FIRST + out, mask=real, other=K)
    next_id = tl.load(IDS + wide * K + slot, mask=real & (slot < K), other=NO_TOKEN)

    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    total_t = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = _logits(H, W, row, column, N, end, D, stride_h, stride_w, DEPTH, PRECISION)
        beyond = tl.minimum(start + COLUMNS, end)
        z = tl.where((column < end)[None, :], z, float("-inf"))

        has_label = (label >= start) & (label < beyond)
        if tl.max(has_label.to(tl.int32), 0) > 0:
            found = tl.where(_is_at(z, label - start), z, 0.0)
            tl.store(Z_LABEL + row, tl.sum(found, 1), mask=has_label)
        # One id of each row a turn: hardly more than a turn a tile, as K is small beside V.
        while tl.min(next_id, 0) < beyond:
            here = next_id < beyond
            is_id = _is_at(z, next_id - start)
            tl.store(Z_IDS + wide * K + slot, tl.sum(tl.where(is_id, z, 0.0), 1), mask=here)
            z = tl.where(is_id, float("-inf"), z)
            slot += here.to(tl.int32)
            following = tl.load(IDS + wide * K + slot, mask=here & (slot < K), other=NO_TOKEN)
            next_id = tl.where(here, following, next_id)

        higher = tl.maximum(top, tl.max(z, 1))
        z -= higher[:, None]
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z), 1)
        if not T_IS_1:
            total_t = total_t * tl.exp((top - higher) * inv_t) + tl.sum(tl.exp(z * inv_t), 1)
        top = higher
    tl.store(TOP + out, top, mask=real)
    tl.store(TOTAL + out, total, mask=real)
    if not T_IS_1:
        tl.store(TOTAL_T + out, total_t, mask=real)


@triton.jit(do_not_specialize=["N", "begin", "end"])
def chunk_gradient(
    H,  # [N, d], rows `stride_h` apart
    W,  # [V, d], rows `stride_w` apart
    TOP,  # float32 [N]
    CE_SCALE,  # float32 [N]; at T = 1 the sum of both scales
    KL_SCALE,  # float32 [N]; read unless T_IS_1
    G,  # [N, end - begin], rows `stride_g` apart, written
    N,
    D,
    stride_h,
    stride_w,
    stride_g,
    begin,
    end,
    inv_t,  # 1 / T
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    T_IS_1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Blocks of rows in groups, all columns of one before the next: what a group reads stays in the cache.
    width = GROUP * tl.cdiv(end - begin, COLUMNS)
    group = tl.program_id(0) // width * GROUP
    size = tl.minimum(tl.cdiv(N, ROWS) - group, GROUP)
    within = tl.program_id(0) % width
    row = (group + within % size) * ROWS + tl.arange(0, ROWS)
    column = begin + within // size * COLUMNS + tl.arange(0, COLUMNS)
    real = row < N

    z = _logits(H, W, row, column, N, end, D, stride_h, stride_w, DEPTH, PRECISION)
    # At an id this may overflow, and at a row without a tail it is 0 * inf: `put_ids` writes over both.
    z -= tl.load(TOP + row, mask=real, other=0.0)[:, None]
    gradient = tl.load(CE_SCALE + row, mask=real, other=0.0)[:, None] * tl.exp(z)
    if not T_IS_1:
        gradient += tl.load(KL_SCALE + row, mask=real, other=0.0)[:, None] * tl.exp(z * inv_t)
    at = G + row[:, None].to(tl.int64) * stride_g + (column - begin)[None, :]
    tl.store(at, gradient.to(G.dtype.element_ty), mask=real[:, None] & (column < end)[None, :])


@triton.jit(do_not_specialize=["K", "begin", "end"])
def put_ids(
    G,  # [N, end - begin], rows `stride_g` apart, written at the ids and labels of this chunk
    IDS,  # int32 [N, K]
    AT_IDS,  # float32 [N, K]
    LABELS,  # int32 [N]; a label among the ids is -1 here, and part of AT_IDS
    AT_LABEL,  # float32 [N]
    stride_g,
    K,
    begin,
    end,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    G += n * stride_g
    for start in range(0, K, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        ids = tl.load(IDS + n * K + slot, mask=slot < K, other=NO_TOKEN)
        here = (ids >= begin) & (ids < end)
        gradient = tl.load(AT_IDS + n * K + slot, mask=here, other=0.0)
        tl.store(G + (ids - begin), gradient.to(G.dtype.element_ty), mask=here)
    label = tl.load(LABELS + n)
    gradient = tl.load(AT_LABEL + n)
    tl.store(G + (label - begin), gradient.to(G.dtype.element_ty), mask=(label >= begin) & (label < end))


def fused_linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    *,
    gamma: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    vocab_chunk: int = 8192,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE [N], KL [N], d_hidden [N, d], d_weight [V, d], all float32.

    CE and KL are in nats and without the factor gamma T^2; the gradients are those of
    sum(CE + gamma T^2 KL), a sum and not a mean. Equals `sparse_kl` on hidden @ weight.T and the two
    products that follow it, for a third more operations but without [N, V].

    hidden    float32, float16 or bfloat16 [N, d] the student's last hidden states. Rows at `ignore_index`
              cost nothing but a copy of the others, give zeros everywhere, and may hold NaN
    weight    of hidden's dtype [V, d]. Either is copied if it is not contiguous along d, and padded if d is
              no multiple of 16
    labels    int64 [N], `ignore_index` where a position has none
    ids       int32 [N, K] in any order, padding -1 in any slot. No id twice in a row: not checked, but then
              KL is inf unless a weight is 0
    logprobs  float32 [N, K], natural log of the teacher's weights; padding is -inf, and not looked at
    tail      float32 [N], natural log of the weight of "every other token"; -inf: none.
              Rows with and without one may be mixed. A row without ids and tail gives CE alone, KL = 0
    bias      None: not written yet
    vocab_chunk  tokens whose logit gradients exist at a time, at least 16. Each chunk reads and writes
              d_hidden once: keep it in the thousands

    16-bit operands are multiplied as they are and summed in float32; the logit gradients in between are
    rounded to the operands' dtype. float32 is multiplied as tf32x3 on NVIDIA and plainly on AMD; torch's own
    `allow_tf32` rules the two products that follow.

    A tail where the ids cover the vocabulary gives KL = inf, as it should. So do ids outside [0, V);
    labels outside it give CE = NaN. Nothing is recorded for autograd. One transfer from the device: the
    number of labelled rows. On a GPU nothing of this has run.

    Raises ValueError for shapes, dtypes, devices or numbers that do not fit, and for CPU tensors, unless
    TRITON_INTERPRET=1 was set before triton was imported; NotImplementedError for a bias.
    """
    _check(hidden, weight, labels, ids, logprobs, tail)
    arguments.check_numbers(gamma, temperature)
    if vocab_chunk < ALIGNED:
        raise ValueError(f"vocab_chunk {vocab_chunk}: expected at least {ALIGNED}, better thousands")
    if bias is not None:
        raise NotImplementedError(
            "a bias: use pipeline.losses.linear_sparse_kd, or a column of weight and one of ones in hidden"
        )
    device = hidden.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False), torch.cuda.device_of(hidden):
        live = (labels != ignore_index).nonzero()[:, 0]
        ce, kl = hidden.new_zeros(2, len(hidden), dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format)
        if not len(live):
            return ce, kl, d_hidden, d_hidden.new_zeros(weight.shape)
        # Rows without a label go first: 0 * NaN is NaN, so a product would carry them into d_weight.
        some = len(live) < len(hidden)
        given = (hidden, labels, ids, logprobs, tail)
        h, labels, ids, logprobs, tail = (x[live] for x in given) if some else given
        layer = _Layer(_operand(h), _operand(weight), hidden.shape[1], 1.0 / temperature, vocab_chunk)
        targets = _targets(labels, ids, logprobs, tail, len(weight))
        rows = _finish_rows(*_tail_lse(layer, targets), targets, gamma * temperature, 1.0 / temperature)
        d_live, d_weight = _gradients(layer, targets, rows)
        if not some:
            return rows.ce, rows.kl, d_live, d_weight
        for everywhere, part in ((ce, rows.ce), (kl, rows.kl), (d_hidden, d_live)):
            everywhere.index_copy_(0, live, part)
        return ce, kl, d_hidden, d_weight


class _Layer(NamedTuple):
    """The product, as the kernels want it."""

    hidden: Tensor  # [n, d rounded up], the labelled rows
    weight: Tensor  # [V, d rounded up]
    width: int  # d
    inv_t: float
    chunk: int

    @property
    def backend(self) -> str:
        return "hip" if torch.version.hip else "cuda"

    def run(self, name: str, launch: Callable[[Launch, dict[str, Any]], None]) -> None:
        """Launches a matrix kernel of that name: `launch` is given tile and constants, `num_warps` and
        all."""
        constants = partial(tile_constants, backend=self.backend, temperature_1=self.inv_t == 1)

        def run(one: Launch) -> None:
            launch(one, {**constants(one), "num_warps": one.warps, "num_stages": one.stages})

        key = (
            name,
            self.hidden.dtype,
            self.inv_t == 1,
            *tuning.size_class(*self.hidden.shape, len(self.weight)),
        )
        launches = LAUNCHES[self.backend, self.hidden.element_size()]
        run(tuning.pick(launches, key, lambda: run, self.hidden.device))


class _Targets(NamedTuple):
    """What `fused_linear_sparse_kl` was given, put in order; n rows."""

    labels: Tensor  # int32 [n], -1 outside the vocabulary
    ids: Tensor  # int32 [n, K], K > 0, ascending, NO_TOKEN last
    log_w: Tensor  # float32 [n, K], -inf at padding
    log_tail: Tensor  # float32 [n]


class _Rows(NamedTuple):
    """What the second pass needs to know of each row, float32 [n] but for `at_ids` and `lone_label`."""

    ce: Tensor
    kl: Tensor
    top: Tensor  # the tail's maximum
    ce_scale: Tensor  # times exp(z - top): softmax, off the ids
    kl_scale: Tensor  # times exp((z - top) / T): the gradient of gamma T^2 KL, off the ids
    at_ids: Tensor  # [n, K], the gradient there
    at_label: Tensor  # the gradient there, unless the label is among the ids
    lone_label: Tensor  # int32, the label, -1 if it is among the ids


def _operand(x: Tensor) -> Tensor:
    """x [n, d], d and the distance of its rows made multiples of 16: itself, or a copy padded with zeros."""
    fits = x.shape[1] % ALIGNED == 0 and x.stride(1) == 1 and x.stride(0) % ALIGNED == 0
    if fits and x.data_ptr() % 16 == 0:  # which is in bytes, and what triton asks for
        return x
    padded = x.new_zeros(len(x), triton.cdiv(x.shape[1], ALIGNED) * ALIGNED)
    padded[:, : x.shape[1]] = x
    return padded


def _targets(labels: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, vocab: int) -> _Targets:
    inside = (labels >= 0) & (labels < vocab)
    log_w = logprobs.masked_fill(ids == -1, float("-inf"))
    if not ids.shape[1]:
        ids, log_w = ids.new_full((len(ids), 1), -1), log_w.new_full((len(ids), 1), float("-inf"))
    ids, order = ids.masked_fill((ids < 0) | (ids >= vocab), NO_TOKEN.value).sort(1)
    return _Targets(labels.where(inside, -1).int(), ids, log_w.gather(1, order), tail.contiguous())


def _tail_lse(layer: _Layer, targets: _Targets) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TOP, TOTAL, TOTAL_T, Z_IDS, Z_LABEL of the kernel; what it leaves out is -inf, for a label NaN."""
    h, w = layer.hidden, layer.weight
    starts = torch.arange(0, len(w), layer.chunk, dtype=torch.int32, device=h.device)
    first = (
        torch.searchsorted(targets.ids, starts.expand(len(h), -1).contiguous(), out_int32=True)
        .t()
        .contiguous()
    )
    top = torch.empty(first.shape, dtype=torch.float32, device=h.device)
    total, total_t = torch.empty_like(top), torch.empty_like(top)
    z_ids = torch.full_like(targets.log_w, float("-inf"))
    z_label = torch.full_like(targets.log_tail, float("nan"))

    def run(launch: Launch, options: dict[str, Any]) -> None:
        tail_lse[(triton.cdiv(len(h), launch.rows), len(starts))](
            h,
            w,
            targets.labels,
            targets.ids,
            first,
            z_ids,
            z_label,
            top,
            total,
            total_t,
            len(h),
            len(w),
            h.shape[1],
            targets.ids.shape[1],
            h.stride(0),
            w.stride(0),
            layer.chunk,
            layer.inv_t,
            **options,
        )

    layer.run("tail_lse", run)
    return top, total, total if layer.inv_t == 1 else total_t, z_ids, z_label


def _finish_rows(
    tops: Tensor,
    totals: Tensor,
    totals_t: Tensor,
    z_ids: Tensor,
    z_label: Tensor,
    targets: _Targets,
    kl_slope: float,
    inv_t: float,
) -> _Rows:
    """The middle of `sparse_kl_rows`, and as there all is relative to a maximum: the tail to its own, so that
    it may lie hundreds of nats below the ids, the rest to the row's. kl_slope = gamma T: T^2 over T."""
    top = tops.amax(0)
    row_top = torch.maximum(top, z_ids.amax(1))
    fall = top - row_top
    below = z_ids - row_top[:, None]
    tail_sum = (totals * (tops - top).exp()).sum(0)
    tail_sum_t = (totals_t * ((tops - top) * inv_t).exp()).sum(0)
    log_sum = (tail_sum * fall.exp() + below.exp().sum(1)).log()
    log_sum_t = (tail_sum_t * (fall * inv_t).exp() + (below * inv_t).exp().sum(1)).log()
    log_s = below * inv_t - log_sum_t[:, None]
    log_s_tail = tail_sum_t.log() + fall * inv_t - log_sum_t

    w, w_tail = targets.log_w.exp(), targets.log_tail.exp()
    kl = torch.where(w != 0, w * (targets.log_w - log_s), 0.0).sum(1)  # != and not >: NaN must not pass for 0
    kl += torch.where(w_tail != 0, w_tail * (targets.log_tail - log_s_tail), 0.0)
    ce = log_sum - (z_label - row_top)

    mass = w.sum(1) + w_tail
    ce_scale = (fall - log_sum).exp()
    kl_scale = kl_slope * (mass * log_s_tail.exp() - w_tail) / tail_sum_t
    kl_scale = torch.where(tail_sum_t == 0, 0.0, kl_scale)  # the ids cover the vocabulary
    is_label = targets.ids == targets.labels[:, None]
    at_ids = (
        (below - log_sum[:, None]).exp() + kl_slope * (mass[:, None] * log_s.exp() - w) - is_label.float()
    )
    z = z_label - top
    at_label = ce_scale * z.exp() + kl_scale * (z * inv_t).exp() - 1.0
    lone_label = targets.labels.masked_fill(is_label.any(1), -1)
    return _Rows(ce, kl, top, ce_scale, kl_scale, at_ids, at_label, lone_label)


def _gradients(layer: _Layer, targets: _Targets, rows: _Rows) -> tuple[Tensor, Tensor]:
    """d_hidden [n, d] and d_weight [V, d] in float32, a chunk of the vocabulary after the other."""
    h, w, width = layer.hidden, layer.weight, layer.width
    d_hidden = torch.zeros(len(h), width, dtype=torch.float32, device=h.device)
    d_weight = torch.empty(len(w), width, dtype=torch.float32, device=h.device)
    stride = triton.cdiv(min(layer.chunk, len(w)), ALIGNED) * ALIGNED
    scratch = torch.empty(len(h), stride, dtype=h.dtype, device=h.device)
    for begin in range(0, len(w), layer.chunk):
        end = min(begin + layer.chunk, len(w))
        g = scratch[:, : end - begin]
        _chunk_gradient_(g, layer, targets, rows, begin, end)
        d_hidden += _product(g, w[begin:end, :width])
        d_weight[begin:end] = _product(g.t(), h[:, :width])
    return d_hidden, d_weight


def _chunk_gradient_(g: Tensor, layer: _Layer, targets: _Targets, rows: _Rows, begin: int, end: int) -> None:
    """g [n, end - begin] becomes the gradient of the logits of the tokens [begin, end)."""
    h, w, one = layer.hidden, layer.weight, layer.inv_t == 1
    scale = rows.ce_scale + rows.kl_scale if one else rows.ce_scale

    def run(launch: Launch, options: dict[str, Any]) -> None:
        tiles = triton.cdiv(len(h), launch.rows) * triton.cdiv(end - begin, launch.columns)
        chunk_gradient[(tiles,)](
            h,
            w,
            rows.top,
            scale,
            rows.kl_scale,
            g,
            len(h),
            h.shape[1],
            h.stride(0),
            w.stride(0),
            g.stride(0),
            begin,
            end,
            layer.inv_t,
            GROUP=GROUP,
            **options,
        )

    def put(one: Put) -> None:
        put_ids[(len(h),)](
            g,
            targets.ids,
            rows.at_ids,
            rows.lone_label,
            rows.at_label,
            g.stride(0),
            targets.ids.shape[1],
            begin,
            end,
            BLOCK=one.block,
            num_warps=one.warps,
        )

    layer.run("chunk_gradient", run)
    key = ("put_ids", g.dtype, *tuning.size_class(*targets.ids.shape))
    put(tuning.pick(PUTS, key, lambda: put, h.device))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; 16-bit operands are summed and returned in it."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cpu":  # the interpreter; torch has no such product there
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor
) -> None:
    arguments.check_matrix("hidden", hidden, "[N, d]", "d")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: shape {list(weight.shape)}, expected [V, d] with V > 0")
    layer = ("weight", weight, hidden.dtype, (weight.shape[0], hidden.shape[1]))
    arguments.check_rows("hidden", hidden, labels, ids, logprobs, tail, layer)
    arguments.check_device("hidden", hidden, tail_lse)
