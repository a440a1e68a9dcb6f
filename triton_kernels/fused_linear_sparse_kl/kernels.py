"""The three kernels: the tail's sums, the gradient of a chunk's logits, and its ids and labels set right."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum of nothing that may be subtracted from -inf
# Among the sorted ids: padding and what is outside the vocabulary, last in the row.
NO_TOKEN = tl.constexpr(2**31 - 1)


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


@triton.jit
def _store_label(z, row, label, start, beyond, Z_LABEL):
    """The logit of each row's label goes to Z_LABEL, if it is in the tile z of the columns [start, beyond)."""
    here = (label >= start) & (label < beyond)
    if tl.max(here.to(tl.int32), 0) > 0:
        found = tl.where(_is_at(z, label - start), z, 0.0)
        tl.store(Z_LABEL + row, tl.sum(found, 1), mask=here)


@triton.jit
def _take_ids_out(z, row, next_id, slot, start, beyond, IDS, Z_IDS, K):
    """The tile z with -inf at each row's ids, whose logits go to Z_IDS, and the ids and slots that come next."""
    # One id of each row a turn: hardly more than a turn a tile, as K is small beside V.
    while tl.min(next_id, 0) < beyond:
        here = next_id < beyond
        is_id = _is_at(z, next_id - start)
        tl.store(Z_IDS + row * K + slot, tl.sum(tl.where(is_id, z, 0.0), 1), mask=here)
        z = tl.where(is_id, float("-inf"), z)
        slot += here.to(tl.int32)
        following = tl.load(IDS + row * K + slot, mask=here & (slot < K), other=NO_TOKEN)
        next_id = tl.where(here, following, next_id)
    return z, next_id, slot


@triton.jit
def _add_up(z, top, total, total_t, inv_t, T_IS_1: tl.constexpr):
    """Each row's maximum and sums with those of the tile z added."""
    higher = tl.maximum(top, tl.max(z, 1))
    z -= higher[:, None]
    total = total * tl.exp(top - higher) + tl.sum(tl.exp(z), 1)
    if not T_IS_1:
        total_t = total_t * tl.exp((top - higher) * inv_t) + tl.sum(tl.exp(z * inv_t), 1)
    return higher, total, total_t


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
        _store_label(z, row, label, start, beyond, Z_LABEL)
        z, next_id, slot = _take_ids_out(z, wide, next_id, slot, start, beyond, IDS, Z_IDS, K)
        top, total, total_t = _add_up(z, top, total, total_t, inv_t, T_IS_1)
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
