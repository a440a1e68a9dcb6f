"""The row kernel on all that targets and rows can be: padding anywhere, k = V, none at all, far away in memory."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace

import torch
from kernel_cases import GAMMA, INF, Cases, Findings, Rows, six_rows, wrong
from row_kernel import compare, kernel, short_steps

from ddk_pipe.pipeline.targets import PADDING_ID

CASES = case = Cases(short_steps)


# ---------------------------------------------------------------- ids and padding

for _t in (1.0, 2.0):

    @case(f"k=V T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        return compare(six_rows(vocab=100, kept=100), temperature=temperature)


@case("k=0: targets without a column")
def _() -> Findings:
    p = six_rows(kept=0)
    return compare(p.with_targets(tail=torch.tensor([0.0, -INF, -INF, 0.0, -INF, -INF])), temperature=2.0)


@case("k=V-1: a tail of one token")
def _() -> Findings:
    return compare(six_rows(vocab=100, kept=99))


for _place, _columns in {
    "first": [0],
    "last": [11],
    "middle": [3, 4, 7],
    "all but one": [*range(11)],
}.items():

    @case(f"padding {_place}")
    def _(columns: list[int] = _columns) -> Findings:
        p = six_rows()
        ids, logprobs = p.targets.ids.clone(), p.targets.logprobs.clone()
        ids[:, columns], logprobs[:, columns] = PADDING_ID, -INF
        return compare(p.with_targets(ids=ids, logprobs=logprobs), temperature=2.0)


@case("padding in a whole row, all weight in the tail")
def _() -> Findings:
    p = six_rows()
    ids, tail = p.targets.ids.clone(), p.targets.tail.clone()
    ids[3], tail[3] = PADDING_ID, 0.0
    logprobs = p.targets.logprobs.masked_fill(ids == PADDING_ID, -INF)
    return compare(p.with_targets(ids=ids, logprobs=logprobs, tail=tail), temperature=2.0)


@case("padding whose log-weight is not -inf is not looked at")
def _() -> Findings:
    p = six_rows()
    dirty = p.targets.logprobs.masked_fill(p.targets.ids == PADDING_ID, math.nan)
    ce, kl, gradient, _ = kernel(p.with_targets(logprobs=dirty))
    clean = kernel(p)
    same = all(torch.equal(a, b) for a, b in zip((ce, kl, gradient), clean[:3], strict=True))
    return [("as with -inf", wrong(same), 0.0)]


@case("padding leaves token 0 in the softmax")
def _() -> Findings:
    p = six_rows()
    logits, ids = p.logits.clone(), p.targets.ids.clone()
    logits[:5, 0] = 9.0  # dominates: any write through a padding slot would show in CE
    ids[:, 0] = PADDING_ID
    ids[ids == 0] = PADDING_ID
    logprobs = p.targets.logprobs.masked_fill(ids == PADDING_ID, -INF)
    return compare(replace(p, logits=logits).with_targets(ids=ids, logprobs=logprobs))


@case("first and last token as ids")
def _() -> Findings:
    p = six_rows(kept=2)
    ids = torch.tensor([[0, 300]], dtype=torch.int32).repeat(6, 1)
    return compare(p.with_targets(ids=ids, logprobs=torch.full((6, 2), math.log(0.4))), temperature=2.0)


for _where, _column in {"first": 0, "last": 300}.items():

    @case(f"label is the {_where} token")
    def _(column: int = _column) -> Findings:
        p = six_rows()
        return compare(replace(p, labels=p.labels.where(~p.labelled, torch.tensor(column))))


@case("ids in no order")
def _() -> Findings:
    p = six_rows()
    turn = torch.randperm(12)
    return compare(p.with_targets(ids=p.targets.ids[:, turn], logprobs=p.targets.logprobs[:, turn]))


@case("an id of weight 0 has its own class")
def _() -> Findings:
    p = six_rows()
    logprobs = p.targets.logprobs.clone()
    logprobs[:, 5] = -INF
    return compare(p.with_targets(logprobs=logprobs))


# ---------------------------------------------------------------- rows

for _kind, _rows in {"tail": [0, 3], "no tail": [1, 4], "no targets": [2], "ignored": [5]}.items():

    @case(f"only rows with {_kind}" if _kind != "ignored" else "only ignored rows")
    def _(rows: list[int] = _rows) -> Findings:
        p = six_rows()
        index = torch.tensor(rows)
        return compare(Rows(p.logits[index], p.labels[index], p.targets.rows(index)), temperature=2.0)


@case("rows without targets are cross-entropy alone")
def _() -> Findings:
    p = six_rows()
    p = p.with_targets(
        ids=torch.full_like(p.targets.ids, PADDING_ID),
        logprobs=torch.full_like(p.targets.logprobs, -INF),
        tail=torch.full_like(p.targets.tail, -INF),
    )
    _, kl, _, _ = kernel(p)
    return [*compare(p), ("kl is 0, exactly", wrong(bool((kl == 0).all())), 0.0)]


@case("no rows")
def _() -> Findings:
    p = six_rows()
    none = torch.arange(0)
    ce, kl, _, _ = kernel(Rows(p.logits[none], p.labels[none], p.targets.rows(none)))
    return [("empty results", wrong(ce.shape == kl.shape == (0,)), 0.0)]


@case("another ignore_index")
def _() -> Findings:
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    p, t = six_rows(), six_rows().targets
    other = 1000
    for_kernel = p.labels.where(p.labelled, torch.tensor(other))
    for_kernel[1] = other
    logits = p.logits.float()
    ce, _ = sparse_kl(logits, for_kernel, t.ids, t.logprobs, t.tail, gamma=GAMMA, ignore_index=other)
    zero = logits[[1, 5]].abs().sum().item() + ce[[1, 5]].abs().sum().item()
    return [("ignored", zero, 0.0), ("others are not", wrong(bool((ce[[0, 2, 3, 4]] > 0).all())), 0.0)]


@case("row offset past 2^31 elements")
def _() -> Findings:
    """The stride fits in int32 and row 2 times it does not. Four GB of addresses, three pages of memory."""
    stride, vocab = 2**30 + 8, 100
    pages = mmap.mmap(-1, (2 * stride + vocab) * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far = torch.frombuffer(pages, dtype=torch.float16).as_strided((3, vocab), (stride, 1))
    p = six_rows(vocab, kept=5)
    index = torch.tensor([0, 1, 3])
    p = Rows(p.logits[index], p.labels[index], p.targets.rows(index))
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    far.copy_(p.logits)
    t = p.targets
    got = sparse_kl(far, p.labels, t.ids, t.logprobs, t.tail, gamma=GAMMA)
    ce, kl, gradient, _ = kernel(p, torch.float16)
    same = all(torch.equal(a, b) for a, b in zip((*got, far), (ce, kl, gradient), strict=True))
    return [("as near by", wrong(same), 0.0)]


if __name__ == "__main__":
    CASES.main()
