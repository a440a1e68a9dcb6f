"""The cases of test_sparse_kl.py: the Triton kernel in Triton's interpreter, on the CPU, against float64.

The interpreter must be chosen before triton is imported and rules out compiling in the same process, so the
tests run this file once, as `TRITON_INTERPRET=1 python -P interpret_cases.py [NAME ...]`, and read the JSON it
prints: {name: [[what, error, bound], ...]} or {name: traceback}. `CASES` can be listed without triton.

The truth is `ddk_pipe.pipeline.losses.sparse_kd_reference` on the very logits that the kernel was given (after
rounding to their dtype), row by row. Errors are relative norms over the batch.

What this cannot show: races, missing barriers, and anything a GPU's own exp or rounding does.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses import sparse_kd_reference
from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

GAMMA = 0.7
INF = float("inf")
LOSS_BOUND = 1e-6  # given the same rounded logits, in every dtype
# The rounding of the store; the interpreter cuts bfloat16 off where a GPU rounds.
GRADIENT_BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Findings = list[tuple[str, float, float]]  # (what, error, bound)
CASES: dict[str, Callable[[], Findings]] = {}
_seed = 0


@dataclass(frozen=True)
class Problem:
    """N rows for the kernel; logits float64 [N, V], rounded when it is given them."""

    logits: Tensor
    labels: Tensor
    targets: SparseTargets

    @property
    def labelled(self) -> Tensor:
        return self.labels != NO_LABEL

    def with_targets(self, **parts: Tensor) -> Problem:
        return replace(self, targets=replace(self.targets, **parts))


def case(name: str) -> Callable[[Callable[[], Findings]], Callable[[], Findings]]:
    def register(function: Callable[[], Findings]) -> Callable[[], Findings]:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


def problem(vocab: int = 301, kept: int = 12) -> Problem:
    """Six random rows of every kind.

    0 tail, label among the ids     1 no tail, label not among them    2 neither ids nor tail
    3 tail, label not among them    4 no tail, label among the ids     5 ignored, its logits NaN
    """
    logits = 3 * torch.randn(6, vocab, dtype=torch.float64)
    teacher = (logits + torch.randn_like(logits)).log_softmax(1)
    order = (teacher - torch.empty_like(teacher).exponential_().log()).argsort(1, descending=True)
    ids = order[:, :kept].sort(1).values  # drawn from the teacher, without replacement
    logprobs = teacher.gather(1, ids)
    rest = teacher.scatter(1, ids, -INF).logsumexp(1)
    tail = torch.tensor([True, False, False, True, False, True]) & (rest > -INF)
    logprobs = torch.where(tail[:, None], logprobs, logprobs.log_softmax(1)) if kept else logprobs
    ids[2], logprobs[2] = PADDING_ID, -INF
    labels = order[:, -1].clone()
    if kept:
        labels[0], labels[4] = ids[0, kept // 2], ids[4, 0]
    labels[5] = NO_LABEL
    logits[5] = math.nan
    targets = SparseTargets(ids.int(), logprobs.float(), rest.where(tail, torch.tensor(-INF)).float())
    return Problem(logits, labels, targets)


def truth(p: Problem, dtype: torch.dtype, temperature: float, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """CE [N], KL [N] and the gradient [N, V] in float64, at the logits as `dtype` stores them."""
    logits = p.logits.to(dtype).double().requires_grad_()
    losses = [
        sparse_kd_reference(
            logits[n : n + 1],
            p.labels[n : n + 1],
            p.targets.rows(slice(n, n + 1)),
            gamma=gamma,
            temperature=temperature,
        )
        for n in range(len(logits))
    ]
    (gradient,) = torch.autograd.grad(torch.stack([loss.total for loss in losses]).sum(), logits)
    ce, kl = (torch.stack([getattr(loss, part) for loss in losses]).detach() for part in ("ce", "kl"))
    return ce, kl, gradient


def kernel(
    p: Problem,
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
    p: Problem, dtype: torch.dtype = torch.float32, temperature: float = 1.0, gamma: float = GAMMA
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


def relative(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """|got - want| / |want|, NaN if either is not finite: no bound holds then.

    Elements of `want` count for at least `least`. KL is a difference of two sums of about a nat each, so
    below a nat its error is that of the sums: absolute.
    """
    scale = want.double().abs().clamp_min(least).norm().item()
    return float((got.double() - want.double()).norm().item() / (scale or 1.0))


def wrong(holds: bool) -> float:
    return float(not holds)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN: an element that the kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(4).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def short_steps() -> Iterator[None]:
    """128 float32 logits a step in place of thousands, so that small rows take several steps."""
    from ddk_pipe.triton_kernels import sparse_kl as module

    shipped = module.LAUNCHES
    module.LAUNCHES = (module.Launch(kept=512, step_bytes=512, warps=4),)
    try:
        yield
    finally:
        module.LAUNCHES = shipped


# ---------------------------------------------------------------- every dtype, temperature and k

for _name, _dtype in DTYPES.items():
    for _t in (1.0, 2.0, 0.7):
        for _k in (1, 5, 12):

            @case(f"{_name} T={_t:g} k={_k}")
            def _(dtype: torch.dtype = _dtype, temperature: float = _t, kept: int = _k) -> Findings:
                return compare(problem(kept=kept), dtype, temperature)


# ---------------------------------------------------------------- the launches that ship

for _vocab, _k in ((5000, 40), (2049, 256), (4500, 257), (300, 300)):
    for _name in ("float32", "bfloat16"):

        @case(f"shipped launch, V={_vocab} k={_k} {_name}")
        def _(vocab: int = _vocab, kept: int = _k, dtype: torch.dtype = DTYPES[_name]) -> Findings:
            return compare(problem(vocab, kept), dtype, 2.0)


# ---------------------------------------------------------------- ids and padding

for _t in (1.0, 2.0):

    @case(f"k=V T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        return compare(problem(vocab=100, kept=100), temperature=temperature)


@case("k=0: targets without a column")
def _() -> Findings:
    p = problem(kept=0)
    return compare(p.with_targets(tail=torch.tensor([0.0, -INF, -INF, 0.0, -INF, -INF])), temperature=2.0)


@case("k=V-1: a tail of one token")
def _() -> Findings:
    return compare(problem(vocab=100, kept=99))


for _place, _columns in {
    "first": [0],
    "last": [11],
    "middle": [3, 4, 7],
    "all but one": [*range(11)],
}.items():

    @case(f"padding {_place}")
    def _(columns: list[int] = _columns) -> Findings:
        p = problem()
        ids, logprobs = p.targets.ids.clone(), p.targets.logprobs.clone()
        ids[:, columns], logprobs[:, columns] = PADDING_ID, -INF
        return compare(p.with_targets(ids=ids, logprobs=logprobs), temperature=2.0)


@case("padding in a whole row, all weight in the tail")
def _() -> Findings:
    p = problem()
    ids, tail = p.targets.ids.clone(), p.targets.tail.clone()
    ids[3], tail[3] = PADDING_ID, 0.0
    logprobs = p.targets.logprobs.masked_fill(ids == PADDING_ID, -INF)
    return compare(p.with_targets(ids=ids, logprobs=logprobs, tail=tail), temperature=2.0)


@case("padding whose log-weight is not -inf is not looked at")
def _() -> Findings:
    p = problem()
    dirty = p.targets.logprobs.masked_fill(p.targets.ids == PADDING_ID, math.nan)
    ce, kl, gradient, _ = kernel(p.with_targets(logprobs=dirty))
    clean = kernel(p)
    same = all(torch.equal(a, b) for a, b in zip((ce, kl, gradient), clean[:3], strict=True))
    return [("as with -inf", wrong(same), 0.0)]


@case("padding leaves token 0 in the softmax")
def _() -> Findings:
    p = problem()
    logits, ids = p.logits.clone(), p.targets.ids.clone()
    logits[:5, 0] = 9.0  # dominates: any write through a padding slot would show in CE
    ids[:, 0] = PADDING_ID
    ids[ids == 0] = PADDING_ID
    logprobs = p.targets.logprobs.masked_fill(ids == PADDING_ID, -INF)
    return compare(replace(p, logits=logits).with_targets(ids=ids, logprobs=logprobs))


@case("first and last token as ids")
def _() -> Findings:
    p = problem(kept=2)
    ids = torch.tensor([[0, 300]], dtype=torch.int32).repeat(6, 1)
    return compare(p.with_targets(ids=ids, logprobs=torch.full((6, 2), math.log(0.4))), temperature=2.0)


for _where, _column in {"first": 0, "last": 300}.items():

    @case(f"label is the {_where} token")
    def _(column: int = _column) -> Findings:
        p = problem()
        return compare(replace(p, labels=p.labels.where(~p.labelled, torch.tensor(column))))


@case("ids in no order")
def _() -> Findings:
    p = problem()
    turn = torch.randperm(12)
    return compare(p.with_targets(ids=p.targets.ids[:, turn], logprobs=p.targets.logprobs[:, turn]))


@case("an id of weight 0 has its own class")
def _() -> Findings:
    p = problem()
    logprobs = p.targets.logprobs.clone()
    logprobs[:, 5] = -INF
    return compare(p.with_targets(logprobs=logprobs))


# ---------------------------------------------------------------- rows

for _kind, _rows in {"tail": [0, 3], "no tail": [1, 4], "no targets": [2], "ignored": [5]}.items():

    @case(f"only rows with {_kind}" if _kind != "ignored" else "only ignored rows")
    def _(rows: list[int] = _rows) -> Findings:
        p = problem()
        index = torch.tensor(rows)
        return compare(Problem(p.logits[index], p.labels[index], p.targets.rows(index)), temperature=2.0)


@case("rows without targets are cross-entropy alone")
def _() -> Findings:
    p = problem()
    p = p.with_targets(
        ids=torch.full_like(p.targets.ids, PADDING_ID),
        logprobs=torch.full_like(p.targets.logprobs, -INF),
        tail=torch.full_like(p.targets.tail, -INF),
    )
    _, kl, _, _ = kernel(p)
    return [*compare(p), ("kl is 0, exactly", wrong(bool((kl == 0).all())), 0.0)]


@case("no rows")
def _() -> Findings:
    p = problem()
    none = torch.arange(0)
    ce, kl, _, _ = kernel(Problem(p.logits[none], p.labels[none], p.targets.rows(none)))
    return [("empty results", wrong(ce.shape == kl.shape == (0,)), 0.0)]


@case("another ignore_index")
def _() -> Findings:
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    p, t = problem(), problem().targets
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
    p = problem(vocab, kept=5)
    index = torch.tensor([0, 1, 3])
    p = Problem(p.logits[index], p.labels[index], p.targets.rows(index))
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
            p = problem()
            at = p.targets.ids.long()
            lifted = p.logits.scatter_add(1, at.clamp_min(0), torch.full(at.shape, float(gap)).double())
            lifted[2] = p.logits[2]
            return compare(replace(p, logits=lifted), temperature=temperature)

        @case(f"student's ids {_gap} nats under the tail, T={_t:g}")
        def _(gap: int = _gap, temperature: float = _t) -> Findings:
            p = problem()
            at = p.targets.ids.long()
            sunk = p.logits.scatter_add(1, at.clamp_min(0), torch.full(at.shape, -float(gap)).double())
            return compare(replace(p, logits=sunk), temperature=temperature)


for _t in (1.0, 2.0, 0.7):

    @case(f"logits of +-200, T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        p = problem()
        extreme = torch.where(torch.rand_like(p.logits) < 0.5, 200.0, -200.0) + torch.rand_like(p.logits)
        return compare(
            replace(p, logits=extreme.where(p.labelled[:, None], p.logits)), temperature=temperature
        )

    @case(f"logits shifted by 1000, T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        p = problem()
        shift = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0, 1000.0, 0.0])[:, None]
        return compare(replace(p, logits=(p.logits + shift).float().double()), temperature=temperature)


@case("teacher's tail of 1e-30")
def _() -> Findings:
    p = problem()
    tail = p.targets.tail.where(p.targets.tail == -INF, torch.tensor(math.log(1e-30)))
    return compare(p.with_targets(tail=tail), temperature=2.0)


for _t in (1.0, 2.0):

    @case(f"-inf logits in the tail, T={_t:g}")
    def _(temperature: float = _t) -> Findings:
        p = problem()
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
    p = problem()
    kept = torch.zeros_like(p.logits, dtype=torch.bool).scatter(1, p.targets.ids.long().clamp_min(0), True)
    rows = torch.tensor([4])
    q = Problem(p.logits.masked_fill(~kept, -INF)[rows], p.labels[rows], p.targets.rows(rows))
    return compare(q, temperature=2.0)


@case("columns of -inf change nothing")
def _() -> Findings:
    p = problem(vocab=200)
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
    return compare(problem(), temperature=2.0, gamma=0.0)


@case("gradient of a row sums to zero")
def _() -> Findings:
    _, _, gradient, _ = kernel(problem(), temperature=2.0)
    return [("sum over V", gradient.double().sum(1).abs().max().item(), LOSS_BOUND)]


# ---------------------------------------------------------------- gradient=False

for _name, _dtype in DTYPES.items():

    @case(f"gradient=False, {_name}: logits unchanged, same ce and kl")
    def _(dtype: torch.dtype = _dtype) -> Findings:
        p = problem()
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
    p = problem()
    ce, kl, _, margin = kernel(replace(p, labels=labels).with_targets(ids=ids))
    return ce, kl, wrong(bool((margin == 7).all()))


for _bad in (301, 303, 2**31 - 1, -7):

    @case(f"id {_bad}, outside the vocabulary: kl is inf")
    def _(bad: int = _bad) -> Findings:
        p = problem()
        ids = p.targets.ids.clone()
        ids[[0, 1], 11] = bad
        _, kl, touched = _outside(p.labels, ids)
        fine = bool((kl[:2] == INF).all() and kl[2:].isfinite().all())
        return [("kl", wrong(fine), 0.0), ("columns right of the logits", touched, 0.0)]


for _bad in (301, 2**40, -1):

    @case(f"label {_bad}, outside the vocabulary: ce is NaN")
    def _(bad: int = _bad) -> Findings:
        p = problem()
        labels = p.labels.clone()
        labels[[0, 1]] = bad
        ce, _, touched = _outside(labels, p.targets.ids)
        fine = bool(ce[:2].isnan().all() and ce[2:].isfinite().all())
        return [("ce", wrong(fine), 0.0), ("columns right of the logits", touched, 0.0)]


@case("a tail although the ids cover the vocabulary: kl is inf")
def _() -> Findings:
    p = problem(vocab=100, kept=100)
    _, kl, gradient, _ = kernel(p.with_targets(tail=torch.full((6,), -3.0)))
    fine = bool((kl[[0, 1, 3, 4]] == INF).all() and gradient.isfinite().all())
    return [("kl inf, gradient finite", wrong(fine), 0.0)]


@case("a NaN weight or logit reaches the loss")
def _() -> Findings:
    p = problem()
    logprobs, logits = p.targets.logprobs.clone(), p.logits.clone()
    logprobs[0, 3], logits[1, 7] = math.nan, math.nan
    ce, kl, _, _ = kernel(replace(p, logits=logits).with_targets(logprobs=logprobs))
    fine = bool(
        kl[:2].isnan().all() and ce[1].isnan() and kl[2:].isfinite().all() and ce[2:].isfinite().all()
    )
    return [("NaN where it was, nowhere else", wrong(fine), 0.0)]


def _refusals() -> dict[str, tuple[dict[str, object], str]]:
    p = problem()
    wide = torch.zeros(6, 5000, dtype=torch.int32)
    return {
        "float64 logits": ({"logits": p.logits}, "float64"),
        "logits [V]": ({"logits": p.logits[0].float()}, "[N, V]"),
        "logits without columns": ({"logits": torch.zeros(6, 0)}, "V > 0"),
        "transposed logits": ({"logits": torch.zeros(301, 6).t()}, "strides"),
        "rows that share memory": ({"logits": torch.zeros(301).expand(6, 301)}, "strides"),
        "logits that require a gradient": ({"logits": torch.zeros(6, 301, requires_grad=True)}, "detach"),
        "int32 labels": ({"labels": p.labels.int()}, "torch.int64"),
        "five labels": ({"labels": p.labels[:5]}, "[6]"),
        "int64 ids": ({"ids": p.targets.ids.long()}, "torch.int32"),
        "float16 logprobs": ({"logprobs": p.targets.logprobs.half()}, "torch.float32"),
        "fewer logprobs than ids": ({"logprobs": p.targets.logprobs[:, 1:]}, "[6, 12]"),
        "tail [N, 1]": ({"tail": p.targets.tail[:, None]}, "[6]"),
        "another device": ({"tail": p.targets.tail.to("meta")}, "meta"),
        "more ids than any launch holds": ({"ids": wide, "logprobs": wide.float()}, "5000 kept ids"),
        "gamma -1": ({"gamma": -1.0}, "gamma -1"),
        "gamma nan": ({"gamma": math.nan}, "gamma nan"),
        "temperature 0": ({"temperature": 0.0}, "temperature 0"),
    }


@case("refusals name what is wrong and touch nothing")
def _() -> Findings:
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    p = problem()
    findings: Findings = []
    for name, (changed, fragment) in _refusals().items():
        logits = p.logits.float()
        before = logits.clone()
        t = p.targets
        good = {"logits": logits, "labels": p.labels, "ids": t.ids, "logprobs": t.logprobs, "tail": t.tail}
        arguments = {**good, "gamma": GAMMA, **changed}
        call = functools.partial(sparse_kl, **arguments)  # type: ignore[arg-type]
        try:
            call()
        except ValueError as error:
            said = fragment in str(error)
        else:
            said = False
        unchanged = torch.equal(logits.nan_to_num(), before.nan_to_num())
        findings.append((name, wrong(said and unchanged), 0.0))
    return findings


def run(name: str) -> Findings | str:
    torch.manual_seed(zlib.crc32(name.encode()) + _seed)
    steps = contextmanager(lambda: iter([None]))() if name.startswith("shipped") else short_steps()
    try:
        with steps:
            return CASES[name]()
    except Exception:  # noqa: BLE001 - whatever it is, the test of that name shows it
        return traceback.format_exc()


def main(names: list[str]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy: log(0) and -inf - x are meant
    json.dump({name: run(name) for name in names or CASES}, sys.stdout)


if __name__ == "__main__":
    _seed = int(os.environ.get("DDK_TEST_SEED", "0"))
    main(sys.argv[1:])
