"""The fused kernels on all that targets and rows can be: padding anywhere, k = V, ids at the edges of tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import kernel_cases as common
import torch
from fused_problems import LOSS_BOUND, compare, fused, problem, small_tiles
from kernel_cases import INF, Cases, Findings

from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID

CASES = case = Cases(small_tiles)


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


if __name__ == "__main__":
    CASES.main()
