"""The cases of test_fused_linear_sparse_kl.py: the kernels in Triton's interpreter against float64.

The truth is `ddk_pipe.pipeline.losses.sparse_kd_reference` on the logits of the very operands that the
kernels were given, row by row. Errors are relative norms over the batch. bfloat16 is tried as storage
alone: the interpreter multiplies it wrongly. No GPU is used, and these kernels have not run on one.
kernel_cases.py says how this is run.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import kernel_cases as common
import torch
from kernel_cases import GAMMA, INF, Cases, Findings
from torch import Tensor

from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

LOSS_BOUND = 2e-6  # given the same rounded operands, in every dtype
# float16: the logit gradients are rounded before the last two products.
GRADIENT_BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 16 x 64 in place of 128 x 128, so that small problems take several, and ragged ones."""
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import launches as module

    tile = module.Launch(rows=16, columns=64, depth=16, warps=4, stages=2)
    with (
        mock.patch.dict(module.LAUNCHES, dict.fromkeys(module.LAUNCHES, (tile,))),
        mock.patch.object(module, "PUTS", (module.Put(block=8, warps=4),)),  # fewer than the ids of a row
    ):
        yield


CASES = case = Cases(small_tiles)


@dataclass(frozen=True)
class Problem:
    """N rows for the kernels; hidden [N, d] and weight [V, d] in float64, to be rounded for them."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    targets: SparseTargets

    def rounded(self, dtype: torch.dtype) -> Problem:
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def rows(self, index: Tensor) -> Problem:
        return replace(
            self, hidden=self.hidden[index], labels=self.labels[index], targets=self.targets.rows(index)
        )

    def with_targets(self, **parts: Tensor) -> Problem:
        return replace(self, targets=replace(self.targets, **parts))


def problem(vocab: int = 301, kept: int = 12, width: int = 24, grid: bool = False) -> Problem:
    """The six kinds of rows of kernel_cases.six_rows, the ignored one with NaN hidden states.

    With `grid` all numbers are multiples of 1/8, so that float32 logits are exact however the sum is split.
    """
    p = common.six_rows(vocab, kept)
    hidden = torch.randn(len(p.labels), width, dtype=torch.float64)
    weight = 2 * torch.randn(vocab, width, dtype=torch.float64) / math.sqrt(width)
    if grid:
        hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    hidden[p.labels == NO_LABEL] = math.nan
    return Problem(hidden, weight, p.labels, p.targets)


def lifted(p: Problem, gap: float) -> Problem:
    """All rows keep the first row's ids, whose logits `gap` is added to: exactly so, if p is on a grid."""
    ids = p.targets.ids[:1].expand_as(p.targets.ids).contiguous()
    ids[2] = PADDING_ID
    hidden, weight = p.hidden.clone(), p.weight.clone()
    hidden[:5, 0] = 1.0
    weight[:, 0] = 0.0
    weight[ids[0].long(), 0] = gap
    return replace(p, hidden=hidden, weight=weight).with_targets(ids=ids)


def truth(p: Problem, temperature: float, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE [N], KL [N], d_hidden [N, d], d_weight [V, d] in float64."""
    hidden, weight = p.hidden.double(), p.weight.double()
    rows = common.Rows(hidden @ weight.t(), p.labels, p.targets)
    ce, kl, gradient = common.truth(rows, torch.float64, temperature, gamma)
    clean = hidden.masked_fill((p.labels == NO_LABEL)[:, None], 0.0)
    return ce, kl, gradient @ weight, gradient.t() @ clean


def fused(
    p: Problem, temperature: float = 1.0, gamma: float = GAMMA, chunk: int = 112, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is tested, torch.empty filled with NaN. A chunk is no multiple of a tile and ends before V."""
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import fused_linear_sparse_kl

    t = p.targets
    operands = (p.hidden, p.weight, p.labels, t.ids, t.logprobs, t.tail)
    with common.poisoned_outputs():
        return fused_linear_sparse_kl(
            *operands, gamma=gamma, temperature=temperature, vocab_chunk=chunk, **options
        )


def compare(
    p: Problem,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    gamma: float = GAMMA,
    chunk: int = 112,
) -> Findings:
    """The kernels against the truth, and all that must hold for any input."""
    p = p.rounded(dtype)
    got = fused(p, temperature, gamma, chunk)
    want = truth(p, temperature, gamma)
    ignored = p.labels == NO_LABEL
    idle = torch.cat([got[0][ignored], got[1][ignored], got[2][ignored].flatten()])
    bound = GRADIENT_BOUNDS[dtype]
    return [
        ("ce", common.relative(got[0], want[0]), LOSS_BOUND),
        ("kl", common.relative(got[1], want[1], least=1.0), LOSS_BOUND),
        ("d_hidden", common.relative(got[2], want[2]), bound),
        ("d_weight", common.relative(got[3], want[3]), bound),
        ("float32", common.wrong(all(x.dtype == torch.float32 for x in got)), 0.0),
        ("ignored rows give zeros", common.wrong(bool((idle == 0).all())), 0.0),
    ]


# ---------------------------------------------------------------- every dtype, temperature and k

for _name, _dtype in DTYPES.items():
    for _t in (1.0, 2.0):
        for _k in (1, 12):

            @case(f"{_name} T={_t:g} k={_k}")
            def _(dtype: torch.dtype = _dtype, temperature: float = _t, kept: int = _k) -> Findings:
                return compare(problem(kept=kept), dtype, temperature)


@case("T=0.7, gamma=0")
def _() -> Findings:
    return [*compare(problem(), temperature=0.7), *compare(problem(), temperature=2.0, gamma=0.0)]


@case("shipped launch, float32")
def _() -> Findings:
    return compare(problem(width=40), temperature=2.0, chunk=8192)


@case("shipped launch, float16")
def _() -> Findings:
    return compare(problem(width=72), torch.float16, temperature=2.0, chunk=208)


# ---------------------------------------------------------------- shapes

for _rows, _vocab, _width in ((1, 37, 16), (17, 160, 40), (20, 211, 33), (33, 97, 7)):

    @case(f"N={_rows} V={_vocab} d={_width}")
    def _(rows: int = _rows, vocab: int = _vocab, width: int = _width) -> Findings:
        parts = [problem(vocab, 5, width) for _ in range(math.ceil(rows / 6))]
        index = torch.arange(rows)
        p = replace(
            parts[0],
            hidden=torch.cat([q.hidden for q in parts])[index],
            labels=torch.cat([q.labels for q in parts])[index],
            targets=SparseTargets(
                *(
                    torch.cat([getattr(q.targets, part) for q in parts])[index]
                    for part in ("ids", "logprobs", "tail")
                )
            ),
        )
        return compare(p, temperature=2.0, chunk=80)


for _chunk in (16, 33, 301, 4096):

    @case(f"vocab_chunk={_chunk}")
    def _(chunk: int = _chunk) -> Findings:
        return compare(problem(), temperature=2.0, chunk=chunk)


@case("operands that are not contiguous")
def _() -> Findings:
    p = problem(width=32).rounded(torch.float32)
    want = fused(p)
    wide = torch.full((6, 40), 7.0)
    wide[:, 3:35] = p.hidden
    turned = p.weight.t().contiguous().t()
    sparse = {
        "ids": p.targets.ids.t().contiguous().t(),
        "logprobs": p.targets.logprobs.t().contiguous().t(),
        "tail": torch.stack([p.targets.tail] * 2, 1)[:, 0],
    }
    got = fused(replace(p, hidden=wide[:, 3:35], weight=turned).with_targets(**sparse))
    worst = max(common.relative(a, b) for a, b in zip(got, want, strict=True))
    return [("as if they were", worst, 1e-6)]


@case("row offsets past 2^31 elements")
def _() -> Findings:
    """Row 2 of hidden and of weight. Eight GB of addresses, a few pages of memory."""
    stride, width = 2**30 + 16, 16

    def far(x: Tensor) -> Tensor:
        size = ((len(x) - 1) * stride + width) * 2
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.float16).as_strided(x.shape, (stride, 1)).copy_(x)

    p = problem(vocab=4, kept=1, width=width).rounded(torch.float16).rows(torch.tensor([0, 1, 3]))
    near = fused(p)
    got = fused(replace(p, hidden=far(p.hidden), weight=far(p.weight)))
    return [("as near by", common.wrong(all(torch.equal(a, b) for a, b in zip(got, near, strict=True))), 0.0)]


# ---------------------------------------------------------------- ids and padding

for _t in (1.0, 2.0):

    @case(f"k=V T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        return compare(problem(vocab=100, kept=100), temperature=temperature, chunk=64)


@case("k=0: targets without a column")
def _() -> Findings:
    p = problem(kept=0)
    return compare(p.with_targets(tail=torch.tensor([0.0, -INF, -INF, 0.0, -INF, -INF])), temperature=2.0)


@case("k=V-1: a tail of one token")
def _() -> Findings:
    return compare(problem(vocab=100, kept=99), chunk=64)


@case("padding in any slot")
def _() -> Findings:
    p = problem()
    ids, logprobs = p.targets.ids.clone(), p.targets.logprobs.clone()
    for row, columns in {0: [0, 3, 4], 1: [11], 3: [*range(11)]}.items():
        ids[row, columns], logprobs[row, columns] = PADDING_ID, -INF
    dirty = logprobs.masked_fill(ids == PADDING_ID, math.nan)
    p = p.with_targets(ids=ids, logprobs=logprobs).rounded(torch.float32)
    same = zip(fused(p), fused(p.with_targets(logprobs=dirty)), strict=True)
    looked_at = not all(torch.equal(a, b) for a, b in same)
    return [*compare(p, temperature=2.0), ("its log-weight is not looked at", float(looked_at), 0.0)]


@case("padding leaves token 0 in the softmax")
def _() -> Findings:
    p = problem()
    hidden, weight, ids = p.hidden.clone(), p.weight.clone(), p.targets.ids.clone()
    hidden[:5, 0], weight[0, 0] = 1.0, 9.0
    ids[ids == 0] = PADDING_ID
    ids[:, 0] = PADDING_ID
    logprobs = p.targets.logprobs.masked_fill(ids == PADDING_ID, -INF)
    return compare(replace(p, hidden=hidden, weight=weight).with_targets(ids=ids, logprobs=logprobs))


@case("ids in no order")
def _() -> Findings:
    p = problem()
    turn = torch.randperm(12)
    return compare(p.with_targets(ids=p.targets.ids[:, turn], logprobs=p.targets.logprobs[:, turn]))


@case("ids at the edges of tiles and chunks")
def _() -> Findings:
    p = problem()
    edges = torch.tensor([0, 31, 32, 63, 64, 111, 112, 143, 144, 223, 224, 300], dtype=torch.int32)
    ids = edges.expand(6, 12).clone()
    ids[2] = PADDING_ID
    labels = torch.tensor([111, 112, 144, 224, 300, NO_LABEL])
    return compare(replace(p, labels=labels).with_targets(ids=ids), temperature=2.0)


@case("all ids in one tile")
def _() -> Findings:
    ids = torch.arange(112, 124, dtype=torch.int32).expand(6, 12).clone()
    ids[2] = PADDING_ID
    return compare(problem().with_targets(ids=ids), temperature=2.0)


@case("an id of weight 0 has its own class")
def _() -> Findings:
    p = problem()
    logprobs = p.targets.logprobs.clone()
    logprobs[:, 5] = -INF
    return compare(p.with_targets(logprobs=logprobs))


@case("a program writes only what lies in its own chunk")
def _() -> Findings:
    """On a GPU the chunks race; here the next would write over the mistake. So: the first chunk alone."""
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.layer import Layer
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.passes import tail_sums
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.rows import in_order

    p = problem(width=32).rows(torch.arange(5)).rounded(torch.float32)
    ids = torch.tensor([0, 63, 64, 99, 100, 111, 112, 127, 128, 300], dtype=torch.int32).expand(5, 10)
    labels = torch.tensor([99, 100, 127, 128, 0])
    logprobs = torch.full((5, 10), math.log(0.1))
    targets = in_order(301, labels, ids, logprobs, p.targets.tail)
    layer = Layer(p.hidden, p.weight[:100], 32, 0.5, 112)  # this chunk ends inside a tile
    full_like = torch.full_like
    with mock.patch.object(torch, "full_like", lambda like, _: full_like(like, 7.0)):
        sums = tail_sums(layer, targets)
    logits = p.hidden @ p.weight.t()
    want = logits.gather(1, ids.long()).masked_fill(ids >= 100, 7.0)
    want_label = logits.gather(1, labels[:, None])[:, 0].masked_fill(labels >= 100, 7.0)
    return [
        ("logits of the ids", common.relative(sums.z_ids, want), LOSS_BOUND),
        ("logits of the labels", common.relative(sums.z_label, want_label), LOSS_BOUND),
    ]


# ---------------------------------------------------------------- rows

for _kind, _index in {"tail": [0, 3], "no tail": [1, 4], "no targets": [2], "ignored": [5]}.items():

    @case(f"only rows: {_kind}")
    def _(index: list[int] = _index) -> Findings:
        return compare(problem().rows(torch.tensor(index)), temperature=2.0)


@case("no rows")
def _() -> Findings:
    p = problem().rounded(torch.float32)
    ce, kl, d_hidden, d_weight = fused(p.rows(torch.arange(0)))
    shapes = ce.shape == kl.shape == (0,) and d_hidden.shape == (0, 24)
    return [("empty, zeros", common.wrong(shapes and bool((d_weight == 0).all())), 0.0)]


@case("another ignore_index")
def _() -> Findings:
    p = problem().rounded(torch.float32)
    want = fused(p)
    got = fused(replace(p, labels=p.labels.masked_fill(p.labels == NO_LABEL, 1000)), ignore_index=1000)
    return [("as -100", common.wrong(all(torch.equal(a, b) for a, b in zip(got, want, strict=True))), 0.0)]


@case("nothing is recorded, nothing is cast: operands that require gradients, under autocast")
def _() -> Findings:
    p = problem().rounded(torch.float32)
    want = fused(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(replace(p, hidden=p.hidden.requires_grad_(), weight=p.weight.requires_grad_()))
    same = all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, want, strict=True))
    return [("as without", common.wrong(same), 0.0)]


# ---------------------------------------------------------------- extremes


def _tails(p: Problem, temperature: float) -> float:
    """The log of the student's weight off the ids over that on them, mean of the rows with ids."""
    z, ids = p.hidden @ p.weight.t() / temperature, p.targets.ids[:1].long()
    odds = z.scatter(1, ids.expand(6, -1), -INF).logsumexp(1) - z[:, ids[0]].logsumexp(1)
    return float(odds[[0, 1, 3, 4]].mean())


for _t in (1.0, 2.0):
    for _name, _dtype in DTYPES.items():

        @case(f"student's tail of 1e-5, {_name} T={_t:g}")
        def _(temperature: float = _t, dtype: torch.dtype = _dtype) -> Findings:
            p = problem(grid=True)
            p = lifted(p, round(8 * temperature * (math.log(1e5) + _tails(lifted(p, 0.0), temperature))) / 8)
            fits = abs(_tails(p, temperature) - math.log(1e-5)) < 1
            return [*compare(p, dtype, temperature), ("tails as said", common.wrong(fits), 0.0)]

    for _gap in (100, 300, -100):
        _where = f"{_gap} nats below" if _gap > 0 else f"{-_gap} nats above"

        @case(f"student's tail {_where} the ids, T={_t:g}")
        def _(gap: int = _gap, temperature: float = _t) -> Findings:
            return compare(lifted(problem(grid=True), float(gap)), temperature=temperature)


@case("logits of some 200, T=0.7")
def _() -> Findings:
    p = problem(grid=True)
    return compare(replace(p, hidden=64 * p.hidden), temperature=0.7)


@case("a tail of -inf logits")
def _() -> Findings:
    """Float32 sums that overflow: -inf off the ids, in whole chunks, and for a part of the rows."""
    p = problem(grid=True).rounded(torch.float32)
    hidden, weight = p.hidden.clone(), p.weight.clone()
    weight[112:, 0] = -INF
    weight[:112, 0] = 0.0
    hidden[:5, 0] = 1.0
    ids = torch.arange(12, dtype=torch.int32).expand(6, 12).clone()
    ids[2] = PADDING_ID
    labels = torch.tensor([3, 50, 111, 60, 11, NO_LABEL])
    p = replace(p, hidden=hidden, weight=weight, labels=labels).with_targets(ids=ids)
    ce, kl, _, _ = fused(p, 2.0)
    finite = replace(p, weight=weight[:112])
    want = truth(finite, 2.0, GAMMA)
    return [
        ("ce", common.relative(ce, want[0]), LOSS_BOUND),
        ("kl", common.relative(kl, want[1], least=1.0), LOSS_BOUND),
    ]


# ---------------------------------------------------------------- bfloat16 as storage


@case("bfloat16 logit gradients")
def _() -> Findings:
    """What writes them, after a product in float32. The interpreter cuts off where a GPU rounds."""
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.layer import Layer
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.passes import tail_sums, write_gradient
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.rows import finish_rows, in_order

    p = problem(width=32).rows(torch.arange(5)).rounded(torch.float32)
    t = p.targets
    layer = Layer(p.hidden, p.weight, 32, 0.5, 112)
    targets = in_order(301, p.labels, t.ids, t.logprobs, t.tail)
    rows = finish_rows(tail_sums(layer, targets), targets, GAMMA * 2.0, 0.5)
    g = torch.full((5, 304), 7.0, dtype=torch.bfloat16)
    for begin, end in ((0, 112), (112, 224), (224, 301)):
        write_gradient(g[:, begin:end], layer, targets, rows, begin, end)
    logits = p.hidden.double() @ p.weight.double().t()
    want = common.truth(common.Rows(logits, p.labels, t), torch.float64, 2.0, GAMMA)[2]
    margin = bool((g[:, 301:] == 7).all())
    return [
        ("gradient", common.relative(g[:, :301], want), 8e-3),
        ("columns right of it", common.wrong(margin), 0.0),
    ]


# ---------------------------------------------------------------- wrong input must show

for _bad in (301, 2**31 - 1, -7):

    @case(f"id {_bad}, outside the vocabulary: kl is inf")
    def _(bad: int = _bad) -> Findings:
        p = problem().rounded(torch.float32)
        ids = p.targets.ids.clone()
        ids[[0, 1], 11] = bad
        _, kl, _, _ = fused(p.with_targets(ids=ids))
        fine = bool((kl[:2] == INF).all() and kl[2:].isfinite().all())
        return [("kl", common.wrong(fine), 0.0)]


@case("an id twice: kl is inf")
def _() -> Findings:
    p = problem().rounded(torch.float32)
    ids = p.targets.ids.clone()
    ids[[0, 1], 11] = ids[[0, 1], 10]
    _, kl, _, _ = fused(p.with_targets(ids=ids))
    return [("kl", common.wrong(bool((kl[:2] == INF).all() and kl[2:].isfinite().all())), 0.0)]


for _bad in (301, 2**40, -1):

    @case(f"label {_bad}, outside the vocabulary: ce is NaN")
    def _(bad: int = _bad) -> Findings:
        p = problem().rounded(torch.float32)
        labels = p.labels.clone()
        labels[[0, 1]] = bad
        ce, _, _, _ = fused(replace(p, labels=labels))
        return [("ce", common.wrong(bool(ce[:2].isnan().all() and ce[2:].isfinite().all())), 0.0)]


@case("a tail although the ids cover the vocabulary: kl is inf")
def _() -> Findings:
    p = problem(vocab=100, kept=100).rounded(torch.float32)
    _, kl, d_hidden, d_weight = fused(p.with_targets(tail=torch.full((6,), -3.0)))
    fine = bool((kl[[0, 1, 3, 4]] == INF).all() and d_hidden.isfinite().all() and d_weight.isfinite().all())
    return [("kl inf, gradients finite", common.wrong(fine), 0.0)]


@case("a NaN weight or hidden state reaches the loss")
def _() -> Findings:
    p = problem().rounded(torch.float32)
    logprobs, hidden = p.targets.logprobs.clone(), p.hidden.clone()
    logprobs[0, 3], hidden[1, 7] = math.nan, math.nan
    ce, kl, _, _ = fused(replace(p, hidden=hidden).with_targets(logprobs=logprobs))
    fine = bool(
        kl[:2].isnan().all() and ce[1].isnan() and kl[2:].isfinite().all() and ce[2:].isfinite().all()
    )
    return [("NaN where it was, nowhere else", common.wrong(fine), 0.0)]


def _refused() -> dict[str, tuple[dict[str, object], type[Exception], str]]:
    p = problem().rounded(torch.float32)
    t = p.targets
    return {
        "float64 operands": ({"hidden": p.hidden.double()}, ValueError, "float64"),
        "hidden [d]": ({"hidden": p.hidden[0]}, ValueError, "[N, d]"),
        "hidden without columns": ({"hidden": p.hidden[:, :0]}, ValueError, "d > 0"),
        "weight without rows": ({"weight": p.weight[:0]}, ValueError, "V > 0"),
        "a narrower weight": ({"weight": p.weight[:, 1:]}, ValueError, "[301, 24]"),
        "a float16 weight": ({"weight": p.weight.half()}, ValueError, "torch.float32"),
        "int32 labels": ({"labels": p.labels.int()}, ValueError, "torch.int64"),
        "five labels": ({"labels": p.labels[:5]}, ValueError, "[6]"),
        "int64 ids": ({"ids": t.ids.long()}, ValueError, "torch.int32"),
        "ids [N]": ({"ids": t.ids[:, 0]}, ValueError, "[N, K]"),
        "float16 logprobs": ({"logprobs": t.logprobs.half()}, ValueError, "torch.float32"),
        "fewer logprobs than ids": ({"logprobs": t.logprobs[:, 1:]}, ValueError, "[6, 12]"),
        "tail [N, 1]": ({"tail": t.tail[:, None]}, ValueError, "[6]"),
        "another device": ({"tail": t.tail.to("meta")}, ValueError, "meta"),
        "gamma -1": ({"gamma": -1.0}, ValueError, "gamma -1"),
        "gamma nan": ({"gamma": math.nan}, ValueError, "gamma nan"),
        "temperature 0": ({"temperature": 0.0}, ValueError, "temperature 0"),
        "vocab_chunk 0": ({"vocab_chunk": 0}, ValueError, "vocab_chunk 0"),
        "a bias": ({"bias": torch.zeros(301)}, NotImplementedError, "linear_sparse_kd"),
    }


@case("refusals name what is wrong")
def _() -> Findings:
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import fused_linear_sparse_kl

    p = problem().rounded(torch.float32)
    t = p.targets
    good = {"hidden": p.hidden, "weight": p.weight, "labels": p.labels}
    good |= {"ids": t.ids, "logprobs": t.logprobs, "tail": t.tail}

    def call(**changed: Any) -> None:
        arguments: dict[str, Any] = {**good, "gamma": GAMMA, **changed}
        fused_linear_sparse_kl(**arguments)

    return common.refusals(call, _refused())


if __name__ == "__main__":
    CASES.main()
