"""The row kernel on extreme logits, and on wrong input, which must show."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from kernel_cases import GAMMA, INF, Cases, Findings, Rows, refusals, relative, six_rows, wrong
from row_kernel import GRADIENT_BOUNDS, LOSS_BOUND, compare, kernel, short_steps
from torch import Tensor

CASES = case = Cases(short_steps)


# ---------------------------------------------------------------- extremes

for _gap in (50, 100, 200, 300):
    for _t in (1.0, 2.0):

        @case(f"student's tail {_gap} nats under the ids, T={_t:g}")
        def _(gap: int = _gap, temperature: float = _t) -> Findings:
            p = six_rows()
            at = p.targets.ids.long()
            lifted = p.logits.scatter_add(1, at.clamp_min(0), torch.full(at.shape, float(gap)).double())
            lifted[2] = p.logits[2]
            return compare(replace(p, logits=lifted), temperature=temperature)

        @case(f"student's ids {_gap} nats under the tail, T={_t:g}")
        def _(gap: int = _gap, temperature: float = _t) -> Findings:
            p = six_rows()
            at = p.targets.ids.long()
            sunk = p.logits.scatter_add(1, at.clamp_min(0), torch.full(at.shape, -float(gap)).double())
            return compare(replace(p, logits=sunk), temperature=temperature)


for _t in (1.0, 2.0, 0.7):

    @case(f"logits of +-200, T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        p = six_rows()
        extreme = torch.where(torch.rand_like(p.logits) < 0.5, 200.0, -200.0) + torch.rand_like(p.logits)
        return compare(
            replace(p, logits=extreme.where(p.labelled[:, None], p.logits)), temperature=temperature
        )

    @case(f"logits shifted by 1000, T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        p = six_rows()
        shift = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0, 1000.0, 0.0])[:, None]
        return compare(replace(p, logits=(p.logits + shift).float().double()), temperature=temperature)


@case("teacher's tail of 1e-30")
def _() -> Findings:
    p = six_rows()
    tail = p.targets.tail.where(p.targets.tail == -INF, torch.tensor(math.log(1e-30)))
    return compare(p.with_targets(tail=tail), temperature=2.0)


for _t in (1.0, 2.0):

    @case(f"-inf logits in the tail, T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        p = six_rows()
        banned = torch.rand_like(p.logits) < 0.3
        banned[:, :128] = True  # a whole first step of nothing
        banned.scatter_(1, p.targets.ids.long().clamp_min(0), False)
        banned[torch.arange(6), p.labels.clamp_min(0)] = False
        q = replace(p, logits=p.logits.masked_fill(banned & p.labelled[:, None], -INF))
        _, _, gradient, _ = kernel(q, temperature=temperature)
        none = gradient[banned & p.labelled[:, None]].abs().sum().item()
        return [*compare(q, temperature=temperature), ("their gradient", none, 0.0)]


@case("-inf in the whole tail, which has no weight")
def _() -> Findings:
    p = six_rows()
    kept = torch.zeros_like(p.logits, dtype=torch.bool).scatter(1, p.targets.ids.long().clamp_min(0), True)
    rows = torch.tensor([4])
    q = Rows(p.logits.masked_fill(~kept, -INF)[rows], p.labels[rows], p.targets.rows(rows))
    return compare(q, temperature=2.0)


@case("columns of -inf change nothing")
def _() -> Findings:
    p = six_rows(vocab=200)
    longer = replace(p, logits=torch.cat([p.logits, torch.full((6, 60), -INF)], 1))
    ce, kl, gradient, _ = kernel(p)
    got_ce, got_kl, got_gradient, _ = kernel(longer)
    return [
        ("ce", relative(got_ce, ce), LOSS_BOUND),
        ("kl", relative(got_kl, kl), LOSS_BOUND),
        ("gradient", relative(got_gradient[:, :200], gradient), GRADIENT_BOUNDS[torch.float32]),
        ("their gradient", got_gradient[:, 200:].abs().sum().item(), 0.0),
    ]


@case("gamma = 0 is cross-entropy, and still reports kl")
def _() -> Findings:
    return compare(six_rows(), temperature=2.0, gamma=0.0)


@case("gradient of a row sums to zero")
def _() -> Findings:
    _, _, gradient, _ = kernel(six_rows(), temperature=2.0)
    return [("sum over V", gradient.double().sum(1).abs().max().item(), LOSS_BOUND)]


# ---------------------------------------------------------------- wrong input must show


def _outside(labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    p = six_rows()
    ce, kl, _, margin = kernel(replace(p, labels=labels).with_targets(ids=ids))
    return ce, kl, wrong(bool((margin == 7).all()))


for _bad in (301, 303, 2**31 - 1, -7):

    @case(f"id {_bad}, outside the vocabulary: kl is inf")
    def _(bad: int = _bad) -> Findings:
        p = six_rows()
        ids = p.targets.ids.clone()
        ids[[0, 1], 11] = bad
        _, kl, touched = _outside(p.labels, ids)
        fine = bool((kl[:2] == INF).all() and kl[2:].isfinite().all())
        return [("kl", wrong(fine), 0.0), ("columns right of the logits", touched, 0.0)]


for _bad in (301, 2**40, -1):

    @case(f"label {_bad}, outside the vocabulary: ce is NaN")
    def _(bad: int = _bad) -> Findings:
        p = six_rows()
        labels = p.labels.clone()
        labels[[0, 1]] = bad
        ce, _, touched = _outside(labels, p.targets.ids)
        fine = bool(ce[:2].isnan().all() and ce[2:].isfinite().all())
        return [("ce", wrong(fine), 0.0), ("columns right of the logits", touched, 0.0)]


@case("a tail although the ids cover the vocabulary: kl is inf")
def _() -> Findings:
    p = six_rows(vocab=100, kept=100)
    _, kl, gradient, _ = kernel(p.with_targets(tail=torch.full((6,), -3.0)))
    fine = bool((kl[[0, 1, 3, 4]] == INF).all() and gradient.isfinite().all())
    return [("kl inf, gradient finite", wrong(fine), 0.0)]


@case("a NaN weight or logit reaches the loss")
def _() -> Findings:
    p = six_rows()
    logprobs, logits = p.targets.logprobs.clone(), p.logits.clone()
    logprobs[0, 3], logits[1, 7] = math.nan, math.nan
    ce, kl, _, _ = kernel(replace(p, logits=logits).with_targets(logprobs=logprobs))
    fine = bool(
        kl[:2].isnan().all() and ce[1].isnan() and kl[2:].isfinite().all() and ce[2:].isfinite().all()
    )
    return [("NaN where it was, nowhere else", wrong(fine), 0.0)]


def _refused() -> dict[str, tuple[dict[str, object], type[Exception], str]]:
    p = six_rows()
    wide = torch.zeros(6, 5000, dtype=torch.int32)
    return {
        "float64 logits": ({"logits": p.logits}, ValueError, "float64"),
        "logits [V]": ({"logits": p.logits[0].float()}, ValueError, "[N, V]"),
        "logits without columns": ({"logits": torch.zeros(6, 0)}, ValueError, "V > 0"),
        "transposed logits": ({"logits": torch.zeros(301, 6).t()}, ValueError, "strides"),
        "rows that share memory": ({"logits": torch.zeros(301).expand(6, 301)}, ValueError, "strides"),
        "logits that require a gradient": (
            {"logits": torch.zeros(6, 301, requires_grad=True)},
            ValueError,
            "detach",
        ),
        "int32 labels": ({"labels": p.labels.int()}, ValueError, "torch.int64"),
        "five labels": ({"labels": p.labels[:5]}, ValueError, "[6]"),
        "int64 ids": ({"ids": p.targets.ids.long()}, ValueError, "torch.int32"),
        "float16 logprobs": ({"logprobs": p.targets.logprobs.half()}, ValueError, "torch.float32"),
        "fewer logprobs than ids": ({"logprobs": p.targets.logprobs[:, 1:]}, ValueError, "[6, 12]"),
        "tail [N, 1]": ({"tail": p.targets.tail[:, None]}, ValueError, "[6]"),
        "another device": ({"tail": p.targets.tail.to("meta")}, ValueError, "meta"),
        "more ids than any launch holds": (
            {"ids": wide, "logprobs": wide.float()},
            ValueError,
            "5000 kept ids",
        ),
        "gamma -1": ({"gamma": -1.0}, ValueError, "gamma -1"),
        "gamma nan": ({"gamma": math.nan}, ValueError, "gamma nan"),
        "temperature 0": ({"temperature": 0.0}, ValueError, "temperature 0"),
    }


@case("refusals name what is wrong and touch nothing")
def _() -> Findings:
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    p = six_rows()
    t, logits = p.targets, p.logits.float()
    before = logits.clone()
    good = {"logits": logits, "labels": p.labels, "ids": t.ids, "logprobs": t.logprobs, "tail": t.tail}

    def call(**changed: object) -> None:
        sparse_kl(**{**good, "gamma": GAMMA, **changed})  # type: ignore[arg-type]

    found = refusals(call, _refused())
    unchanged = torch.equal(logits.nan_to_num(), before.nan_to_num())
    return [*found, ("the logits are as they were", wrong(unchanged), 0.0)]


if __name__ == "__main__":
    CASES.main()
