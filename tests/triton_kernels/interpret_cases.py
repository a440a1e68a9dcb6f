"""The cases of test_sparse_kl.py: the row kernel in Triton's interpreter, on the CPU, against float64.

The truth is `ddk_pipe.pipeline.losses.sparse_kd_reference` on the very logits that the kernel was given (after
rounding to their dtype), row by row. Errors are relative norms over the batch. kernel_cases.py says how this is run.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from kernel_cases import (
    GAMMA,
    INF,
    Cases,
    Findings,
    Rows,
    poisoned_outputs,
    refusals,
    relative,
    six_rows,
    truth,
    wrong,
)
from torch import Tensor

from ddk_pipe.pipeline.targets import PADDING_ID

LOSS_BOUND = 1e-6  # given the same rounded logits, in every dtype
# The rounding of the store; the interpreter cuts bfloat16 off where a GPU rounds.
GRADIENT_BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def short_steps() -> Iterator[None]:
    """128 float32 logits a step in place of thousands, so that small rows take several steps."""
    from ddk_pipe.triton_kernels import sparse_kl as module

    shipped = module.LAUNCHES
    module.LAUNCHES = ((module.Launch(kept=512, step_bytes=512, warps=4),),)
    try:
        yield
    finally:
        module.LAUNCHES = shipped


CASES = case = Cases(short_steps)


def kernel(
    p: Rows,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    gamma: float = GAMMA,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE, KL, what became of the logits, and three columns right of them that nobody may touch."""
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    vocab = p.logits.shape[1]
    buffer = torch.full((len(p.logits), vocab + 3), 7.0, dtype=dtype)
    buffer[:, :vocab] = p.logits.to(dtype)
    logits, margin = buffer[:, :vocab], buffer[:, vocab:]
    t = p.targets
    with poisoned_outputs():
        ce, kl = sparse_kl(
            logits,
            p.labels,
            t.ids,
            t.logprobs,
            t.tail,
            gamma=gamma,
            temperature=temperature,
            gradient=gradient,
        )
    return ce, kl, logits, margin


def compare(
    p: Rows, dtype: torch.dtype = torch.float32, temperature: float = 1.0, gamma: float = GAMMA
) -> Findings:
    """The kernel against the truth, and all that must hold for any input."""
    ce, kl, gradient, margin = kernel(p, dtype, temperature, gamma)
    want_ce, want_kl, want_gradient = truth(p, dtype, temperature, gamma)
    ignored = ~p.labelled
    idle = torch.cat([ce[ignored], kl[ignored], gradient[ignored].flatten()])
    return [
        ("ce", relative(ce, want_ce), LOSS_BOUND),
        ("kl", relative(kl, want_kl, least=1.0), LOSS_BOUND),
        ("gradient", relative(gradient, want_gradient), GRADIENT_BOUNDS[dtype]),
        ("columns right of the logits", wrong(torch.equal(margin, torch.full_like(margin, 7.0))), 0.0),
        ("ignored rows give zeros", wrong(bool((idle == 0).all())), 0.0),
    ]


# ---------------------------------------------------------------- every dtype, temperature and k

for _name, _dtype in DTYPES.items():
    for _t in (1.0, 2.0, 0.7):
        for _k in (1, 5, 12):

            @case(f"{_name} T={_t:g} k={_k}")
            def _(dtype: torch.dtype = _dtype, temperature: float = _t, kept: int = _k) -> Findings:
                return compare(six_rows(kept=kept), dtype, temperature)


# ---------------------------------------------------------------- the launches that ship

for _vocab, _k in ((5000, 40), (2049, 256), (4500, 257), (300, 300)):
    for _name in ("float32", "bfloat16"):

        @case(f"shipped launch, V={_vocab} k={_k} {_name}")
        def _(vocab: int = _vocab, kept: int = _k, dtype: torch.dtype = DTYPES[_name]) -> Findings:
            return compare(six_rows(vocab, kept), dtype, 2.0)


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


# ---------------------------------------------------------------- gradient=False

for _name, _dtype in DTYPES.items():

    @case(f"gradient=False, {_name}: logits unchanged, same ce and kl")
    def _(dtype: torch.dtype = _dtype) -> Findings:
        p = six_rows()
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        ce, kl, logits, margin = kernel(p, dtype, 2.0, gradient=False)
        want_ce, want_kl, _, _ = kernel(p, dtype, 2.0)
        same = torch.equal(logits.contiguous().view(bits), p.logits.to(dtype).view(bits))
        return [
            ("logits, bit for bit", wrong(same), 0.0),
            ("columns right of them", wrong(bool((margin == 7).all())), 0.0),
            ("ce and kl", wrong(torch.equal(ce, want_ce) and torch.equal(kl, want_kl)), 0.0),
        ]


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
