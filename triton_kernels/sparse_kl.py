"""Cross-entropy plus forward KL to sparse teacher targets on materialised logits, in place.

N positions, V student vocabulary, K kept ids of a position, T temperature. With student logits z,
q = softmax(z), s = softmax(z / T), teacher weights w on the ids and w_tail on "every other token",
`sparse_kl` returns for every position with a label y

    CE = -log q[y]
    KL = sum_K w (log w - log s) + w_tail (log w_tail - log s_tail)      last term only with a tail

and overwrites the logits by d(sum CE + gamma T^2 KL)/dz: what `pipeline.losses.sparse_kd_reference`
and autograd give, without any second [N, V]. Made for a loop over chunks of positions: a product
writes the logits of a chunk, this turns them into their gradient, two products consume it.

Each row is read twice and written once. Off the ids the gradient is one scalar of the row times the
softmax over the tail alone (at T = 1 one scalar for CE and KL together), so the first reading finds
the log-sum-exp of the tail and the second one writes; ids and label are then put in place by hand.

Checked against float64 in Triton's interpreter, and compiled ahead of time for four targets
(`compile_gate`). Nothing here has run on a GPU: its speed, and whether the barriers suffice there,
are unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddk_pipe.triton_kernels import arguments, tuning

PADDING = tl.constexpr(-1)  # ids: an unused slot
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum of nothing that may be subtracted from -inf


class Launch(NamedTuple):
    """How one row is spread over the threads of its program."""

    kept: int  # serves K up to this, a power of two: the lanes that hold the ids of the row
    step_bytes: int  # of logits in one step of the loops over V, a power of two
    warps: int

    def block(self, dtype: torch.dtype) -> int:
        """Logits of one step."""
        return self.step_bytes // dtype.itemsize


# For each number of lanes, the narrowest that holds K being taken: the default, then what `tuning` may choose
# instead. None of them spills on any target of `compile_gate`. A step of 4096 bytes at 8 warps is one 16-byte
# load a thread; 8192 bytes at 8 warps spill on sm_80 where V is no multiple of 16 (at 16 on sm_90), 16384 on
# sm_100.
LAUNCHES: tuple[tuple[Launch, ...], ...] = (
    (Launch(256, 4096, 8), Launch(256, 2048, 4), Launch(256, 2048, 8)),
    (Launch(4096, 8192, 16), Launch(4096, 16384, 16)),
)
TRIAL_ROWS = 1024  # of a copy that launches are timed on: the kernel works in place


@triton.jit
def _clear(Z, V, BLOCK: tl.constexpr):
    """Zeros in the row at Z."""
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(Z + at, tl.zeros((BLOCK,), Z.dtype.element_ty), mask=at < V)


@triton.jit
def _sum_lanes(Z, V, inv_t, BLOCK: tl.constexpr, T_IS_1: tl.constexpr):
    """Maximum, sum of exp(z - maximum) and of exp((z - maximum) / T) over the row at Z, lane by lane.

    No reduction inside the loop, and one exp a logit (two at T != 1): of the old sum and the new term, one is
    always exp(0).
    """
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    total_t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(Z + at, mask=at < V, other=float("-inf")).to(tl.float32)
        step = z - top
        higher = step > 0
        shrink = tl.exp(-tl.abs(step))
        total = tl.where(higher, total * shrink + 1.0, total + shrink)
        if not T_IS_1:
            shrink = tl.exp(-tl.abs(step) * inv_t)
            total_t = tl.where(higher, total_t * shrink + 1.0, total_t + shrink)
        top = tl.where(higher, z, top)
    return top, total, total_t


@triton.jit
def _write_off_ids(Z, V, top, ce_scale, kl_scale, inv_t, BLOCK: tl.constexpr, T_IS_1: tl.constexpr):
    """The gradient of the tail over its logits: the two scalars of the row times exp(z - top)."""
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(Z + at, mask=at < V, other=float("-inf")).to(tl.float32) - top
        if T_IS_1:
            dz = (ce_scale + kl_scale) * tl.exp(z)
        else:
            dz = ce_scale * tl.exp(z) + kl_scale * tl.exp(z * inv_t)
        tl.store(Z + at, dz.to(Z.dtype.element_ty), mask=at < V)


@triton.jit(do_not_specialize=["K", "ignore_index"])  # K changes from batch to batch
def sparse_kl_rows(
    Z,  # [N, V], rows `stride` apart: logits in, gradient out
    LABELS,  # int64 [N]
    IDS,  # int32 [N, K]
    LOG_W,  # float32 [N, K], nats
    LOG_TAIL,  # float32 [N], nats
    CE,  # float32 [N], written
    KL,  # float32 [N], written
    stride,
    V,
    K,
    kl_slope,  # gamma T: the loss's T^2, over T from d(z / T)/dz
    inv_t,  # 1 / T
    ignore_index,
    KEPT: tl.constexpr,  # power of two >= K
    BLOCK: tl.constexpr,
    T_IS_1: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # before any product: a row may start past 2^31 elements
    Z += n * stride
    label = tl.load(LABELS + n)
    if label == ignore_index:  # its logits may be NaN: never read
        if GRADIENT:
            _clear(Z, V, BLOCK)
        tl.store(CE + n, 0.0)
        tl.store(KL + n, 0.0)
        return

    # Every logit becomes float32 at once: the interpreter has no bfloat16 arithmetic, nor would we want it.
    # A label or id outside the vocabulary touches no memory; it makes CE NaN, or KL infinite.
    slot = tl.arange(0, KEPT)
    ids = tl.load(IDS + n * K + slot, mask=slot < K, other=PADDING)
    inside = (ids >= 0) & (ids < V)
    found = tl.load(Z + ids, mask=inside, other=float("-inf"))
    label_inside = (label >= 0) & (label < V)
    z_label = tl.load(Z + label, mask=label_inside, other=float("nan")).to(tl.float32)

    # With -inf at its ids the row is the tail alone. The barriers order what one thread writes and another
    # reads: nobody overwrites an id that is still to be read, nobody reads the tail before all are gone.
    tl.debug_barrier()
    gone = tl.full((KEPT,), float("-inf"), tl.float32).to(Z.dtype.element_ty)
    tl.store(Z + ids, gone, mask=inside)
    tl.debug_barrier()

    top, total, total_t = _sum_lanes(Z, V, inv_t, BLOCK, T_IS_1)

    # From here on all is relative to a maximum, which costs no digits however large the logits are:
    # the tail to its own, so that it may lie hundreds of nats below the ids; the rest to the row's.
    tail_top = tl.max(top, 0)
    z_kept = found.to(tl.float32)
    row_top = tl.maximum(tail_top, tl.max(z_kept, 0))
    fall = tail_top - row_top
    z_kept -= row_top
    tail_sum = tl.sum(total * tl.exp(top - tail_top), 0)
    log_sum = tl.log(tail_sum * tl.exp(fall) + tl.sum(tl.exp(z_kept), 0))
    if T_IS_1:
        tail_sum_t = tail_sum
        log_sum_t = log_sum
    else:
        tail_sum_t = tl.sum(total_t * tl.exp((top - tail_top) * inv_t), 0)
        log_sum_t = tl.log(tail_sum_t * tl.exp(fall * inv_t) + tl.sum(tl.exp(z_kept * inv_t), 0))
    log_s = z_kept * inv_t - log_sum_t
    log_s_tail = tl.log(tail_sum_t) + fall * inv_t - log_sum_t

    log_w = tl.load(LOG_W + n * K + slot, mask=slot < K, other=float("-inf"))
    log_w = tl.where(ids == PADDING, float("-inf"), log_w)
    w = tl.exp(log_w)
    log_w_tail = tl.load(LOG_TAIL + n)
    w_tail = tl.exp(log_w_tail)
    kl = tl.sum(tl.where(w != 0, w * (log_w - log_s), 0.0), 0)  # != and not >: NaN must not pass for 0
    kl += tl.where(w_tail != 0, w_tail * (log_w_tail - log_s_tail), 0.0)
    tl.store(CE + n, log_sum - (z_label - row_top))
    tl.store(KL + n, kl)

    if GRADIENT:
        mass = tl.sum(w, 0) + w_tail
        # Times exp(z - tail_top), and exp((z - tail_top) / T): q and the gradient of KL, off the ids.
        ce_scale = tl.exp(fall - log_sum)
        kl_scale = kl_slope * (mass * tl.exp(log_s_tail) - w_tail) / tail_sum_t
        kl_scale = tl.where(tail_sum_t == 0, 0.0, kl_scale)  # the ids cover the vocabulary
        is_label = ids == label
        among_ids = tl.max(is_label.to(tl.int32), 0) > 0
        at_ids = (
            tl.exp(z_kept - log_sum) + kl_slope * (mass * tl.exp(log_s) - w) - tl.where(is_label, 1.0, 0.0)
        )
        below = z_label - tail_top
        at_label = ce_scale * tl.exp(below) + kl_scale * tl.exp(below * inv_t) - 1.0
        _write_off_ids(Z, V, tail_top, ce_scale, kl_scale, inv_t, BLOCK, T_IS_1)
        tl.debug_barrier()  # that wrote 0 at the ids, and q at the label
        tl.store(Z + ids, at_ids.to(Z.dtype.element_ty), mask=inside)
        tl.store(Z + label, at_label.to(Z.dtype.element_ty), mask=label_inside & (among_ids == 0))
    else:
        tl.debug_barrier()
        tl.store(Z + ids, found, mask=inside)  # the very bits that were there


def sparse_kl(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    *,
    gamma: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """CE and KL of each row, float32 [N] each, in nats and without the factor gamma T^2.

    logits    float32, float16 or bfloat16 [N, V], last dimension contiguous. Overwritten by the gradient of
              sum(CE + gamma T^2 KL), a sum and not a mean; with gradient=False the bits are as they were
              once the kernel has ended (ids are masked out in place meanwhile)
    labels    int64 [N]. Rows at `ignore_index` give CE = KL = 0 and gradient 0, and may hold NaN
    ids       int32 [N, K], padding -1 in any slot. No id twice in a row: the result is then undefined,
              and not checked here
    logprobs  float32 [N, K], natural log of the teacher's weights; padding is -inf, and not looked at
    tail      float32 [N], natural log of the weight of "every other token"; -inf: none.
              Rows with and without one may be mixed. A row without ids and tail gives CE alone, KL = 0

    A tail where the ids cover the vocabulary gives KL = inf, as it should. So do ids outside [0, V);
    labels outside it give CE = NaN. Nothing is recorded for autograd.

    Raises ValueError for shapes, dtypes, devices, layouts or numbers that do not fit; for CPU tensors, unless
    TRITON_INTERPRET=1 was set before triton was imported; for K above the widest of `LAUNCHES`.
    """
    _check(logits, labels, ids, logprobs, tail)
    arguments.check_numbers(gamma, temperature)
    launches = launches_for(ids.shape[1])
    ce = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    kl = torch.empty_like(ce)
    if len(logits):
        row = [x.contiguous() for x in (labels, ids, logprobs, tail)]
        _launch(launches, logits, [*row, ce, kl], gamma, temperature, ignore_index, gradient)
    return ce, kl


def _launch(
    launches: Sequence[Launch],
    logits: Tensor,
    rows: Sequence[Tensor],
    gamma: float,
    temperature: float,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Runs the kernel with one of `launches`; `rows` are its arguments from LABELS to KL."""
    vocab, kept = logits.shape[1], rows[1].shape[1]
    # As floats: Triton would compile an int apart, and bake in a 1.
    numbers = (float(gamma * temperature), 1.0 / temperature)
    constants = {"T_IS_1": temperature == 1, "GRADIENT": gradient}

    def run(launch: Launch, z: Tensor) -> None:
        sizes = {"KEPT": launch.kept, "BLOCK": launch.block(z.dtype), "num_warps": launch.warps}
        grid = (len(z),)
        sparse_kl_rows[grid](z, *rows, z.stride(0), vocab, kept, *numbers, ignore_index, **constants, **sizes)

    def trial() -> Callable[[Launch], None]:
        some = logits[:TRIAL_ROWS].clone()
        return lambda launch: run(launch, some)

    with torch.cuda.device_of(logits):  # Triton launches on the current device, whatever its arguments say
        key = ("sparse_kl_rows", logits.dtype, *constants.values(), *tuning.size_class(vocab, kept))
        run(tuning.pick(launches, key, trial, logits.device), logits)


def launches_for(kept: int) -> tuple[Launch, ...]:
    """Those of `LAUNCHES` that serve K, the default first; each serves any V.

    Raises ValueError if none holds so many.
    """
    for launches in LAUNCHES:
        if kept <= launches[0].kept:
            return launches
    most = max(launches[0].kept for launches in LAUNCHES)
    raise ValueError(
        f"{kept} kept ids a row: the widest launch holds {most}; keep fewer"
        ' or use pipeline.losses.linear_sparse_kd(implementation="chunked")'
    )


def _check(logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> None:
    arguments.check_matrix("logits", logits, "[N, V]", "V")
    arguments.check_rows("logits", logits, labels, ids, logprobs, tail)
    rows, vocab = logits.shape
    row_stride, column_stride = logits.stride()
    if (vocab > 1 and column_stride != 1) or (rows > 1 and row_stride < vocab):
        raise ValueError(
            f"logits: strides {logits.stride()}; they are written in place, so rows must be contiguous and apart:"
            " pass logits.contiguous()"
        )
    if logits.requires_grad:
        raise ValueError("logits require a gradient: it is written over them, pass logits.detach()")
    arguments.check_device("logits", logits, sparse_kl_rows)
