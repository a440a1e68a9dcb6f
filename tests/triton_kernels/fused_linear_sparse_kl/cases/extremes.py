"""The fused kernels on extreme logits, with bfloat16 gradients, and on wrong input, which must show."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import kernel_cases as common
import torch
from fused_problems import DTYPES, LOSS_BOUND, Problem, compare, fused, lifted, problem, small_tiles, truth
from kernel_cases import GAMMA, INF, Cases, Findings

from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID

CASES = case = Cases(small_tiles)


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
