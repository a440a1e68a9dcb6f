"""pipeline.losses: the reference against a separate dense computation, the chunked loss against it.

Errors are relative norms. Bounds: 1e-12 in float64, 2e-6 in float32 (facts/kernels.md section 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddk_pipe.pipeline.losses import SparseKdLoss, gradient_skip, linear_sparse_kd, sparse_kd_reference
from ddk_pipe.pipeline.losses import chunked as losses
from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip, Survivors, expected_share
from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

NEG_INF = float("-inf")
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}
BUCKETS = ("threshold", "topk")  # the schemes whose rest is one bucket
SCHEMES = ("pps", *BUCKETS, "random")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows: with one chunk for all, no test would see what is carried between chunks."""
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(losses, "MAX_CHUNK_ROWS", 5)


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """hidden [N, d], weight [V, d], bias [V], labels [N] and targets of N positions."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    targets: SparseTargets

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight, self.bias)


def draw_targets(scheme: str, teacher: Tensor, k: int, gen: torch.Generator) -> SparseTargets:
    """Targets of the shape of each scheme, from dense teacher probabilities [N, V] in float64."""
    rows = [_draw_row(scheme, p, k, gen) for p in teacher]
    return targets_of(rows)


def targets_of(rows: list[tuple[dict[int, float], float]]) -> SparseTargets:
    """Rows of ({id: weight}, tail weight)."""
    width = max((len(weights) for weights, _ in rows), default=0)
    ids = torch.full((len(rows), width), PADDING_ID, dtype=torch.int32)
    log_weights = torch.full((len(rows), width), NEG_INF)
    for i, (weights, _) in enumerate(rows):
        for j, (token, weight) in enumerate(sorted(weights.items())):
            ids[i, j], log_weights[i, j] = token, math.log(weight) if weight else NEG_INF
    tail = torch.tensor([math.log(t) if t else NEG_INF for _, t in rows], dtype=torch.float32)
    return SparseTargets(ids=ids, logprobs=log_weights, tail=tail)


def _draw_row(scheme: str, p: Tensor, k: int, gen: torch.Generator) -> tuple[dict[int, float], float]:
    if scheme == "random":
        draws = torch.multinomial(p, k, replacement=True, generator=gen)
        return {i: draws.tolist().count(i) / k for i in draws.tolist()}, 0.0
    if scheme == "topk":
        head = p.topk(k).indices
    else:
        head = (p >= 0.05).nonzero()[: len(p) - 1, 0]  # ragged; never all, a bucket needs the rest
    weights = {int(i): float(p[i]) for i in head}
    rest = max(1 - sum(weights.values()), 0.0)
    if scheme in BUCKETS:
        return weights, rest
    others = [i for i in range(len(p)) if i not in weights]
    chosen = torch.randperm(len(others), generator=gen)[:3]
    return weights | {others[int(i)]: rest / len(chosen) for i in chosen}, 0.0


def make_case(
    scheme: str = "topk",
    *,
    n: int = 23,
    vocab: int = 97,
    d: int = 13,
    k: int = 5,
    seed: int = 0,
    scale: float = 1.0,
) -> Case:
    """Ragged in every size: 23 positions in chunks of 5, labels missing, inside and outside the ids."""
    gen = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(r, d, dtype=torch.float64, generator=gen) for r in (n, vocab))
    bias = torch.randn(vocab, dtype=torch.float64, generator=gen)
    teacher = torch.randn(n, vocab, dtype=torch.float64, generator=gen).mul_(2).softmax(1)
    targets = draw_targets(scheme, teacher, k, gen)
    labels = torch.randint(0, vocab, (n,), generator=gen)
    for i in range(0, n, 2):
        if targets.ids[i].numel() and targets.ids[i, 0] >= 0:
            labels[i] = int(targets.ids[i, 0])  # inside the ids
    labels[1::5] = NO_LABEL
    return Case(hidden, weight * scale, bias, labels, targets)


# ---------------------------------------------------------------- the truth, written separately


def one_hot_loss(
    logits: Tensor, case: Case, gamma: float, temperature: float, direction: str
) -> tuple[Tensor, Tensor]:
    """CE and KL sums with plain loops over positions: no gather, no padding, no log-sum-exp trick."""
    ce = kl = logits.new_zeros(())
    for i, y in enumerate(case.labels.tolist()):
        if y == NO_LABEL:
            continue
        ce = ce - torch.log(torch.exp(logits[i]) / torch.exp(logits[i]).sum())[y]
        s = torch.exp(logits[i] / temperature) / torch.exp(logits[i] / temperature).sum()
        classes: list[tuple[Tensor, float]] = []  # (student, teacher)
        outside = torch.ones_like(s)
        for token, log_w in zip(case.targets.ids[i], case.targets.logprobs[i], strict=True):
            if int(token) != PADDING_ID:
                classes.append((s[int(token)], math.exp(float(log_w))))
                outside = outside * (1 - F.one_hot(token.long(), len(s)))
        if float(case.targets.tail[i]) > NEG_INF:
            classes.append(((s * outside).sum(), math.exp(float(case.targets.tail[i]))))
        for student, teacher in classes:
            if direction == "forward":
                kl = kl + (teacher * (math.log(teacher) - student.log()) if teacher else 0)
            else:
                kl = kl + student * (student.log() - math.log(teacher))
    return ce, kl


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm()) / max(float(want.norm()), 1e-300)


def logit_gradient(case: Case, **options: Any) -> tuple[SparseKdLoss, Tensor]:
    z = case.logits.clone().requires_grad_()
    loss = sparse_kd_reference(z, case.labels, case.targets, **options)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    return loss, z.grad


LINEAR_SIZES = [(23, 97, 13, 5), (7, 33, 5, 1), (1, 2, 1, 1), (11, 300, 17, 40)]


def linear(
    case: Case, dtype: torch.dtype = torch.float64, upstream: float = 1.0, **options: Any
) -> tuple[SparseKdLoss, list[Tensor]]:
    """The chunked loss in dtype and the gradients of hidden, weight and bias."""
    inputs = [x.detach().to(dtype).clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = linear_sparse_kd(inputs[0], inputs[1], case.labels, case.targets, bias=inputs[2], **options)
    return loss, list(torch.autograd.grad(loss.total * upstream, inputs))


def dense(case: Case, upstream: float = 1.0, **options: Any) -> tuple[SparseKdLoss, list[Tensor]]:
    """What `linear` must equal: the reference on dense float64 logits."""
    inputs = [x.detach().double().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = sparse_kd_reference(F.linear(*inputs), case.labels, case.targets, **options)
    return loss, list(torch.autograd.grad(loss.total * upstream, inputs))


def assert_equals_reference(
    case: Case,
    dtype: torch.dtype = torch.float64,
    bound: float | None = None,
    **options: Any,
) -> None:
    bound = BOUND[dtype] if bound is None else bound
    want, want_gradients = dense(replaced(case, dtype), **options)
    got, got_gradients = linear(case, dtype, **options)
    assert got.positions == want.positions
    for name in ("total", "ce", "kl"):
        assert relative(getattr(got, name), getattr(want, name)) <= bound, name
    for name, mine, true in zip(("hidden", "weight", "bias"), got_gradients, want_gradients, strict=True):
        assert mine.isfinite().all(), name
        assert relative(mine, true) <= bound, name


def replaced(case: Case, dtype: torch.dtype) -> Case:
    """The numbers that a computation in dtype is given, so that only its own error is measured."""
    rounded = {f: getattr(case, f).to(dtype).double() for f in ("hidden", "weight", "bias")}
    return replace(case, **rounded)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(
    ("scheme", "direction"),
    [(s, "forward") for s in SCHEMES] + [(s, "reverse") for s in BUCKETS],
)
def test_the_reference_equals_plain_loops(scheme: str, direction: Any, temperature: float) -> None:
    case = make_case(scheme)
    z = case.logits.clone().requires_grad_()
    ce, kl = one_hot_loss(z, case, 0.7, temperature, direction)
    want = ce + 0.7 * temperature**2 * kl
    (want_gradient,) = torch.autograd.grad(want, z)
    got, gradient = logit_gradient(case, gamma=0.7, temperature=temperature, direction=direction)
    assert relative(got.ce, ce) <= 1e-12
    assert relative(got.kl, kl) <= 1e-12
    assert relative(got.total, want) <= 1e-12
    assert relative(gradient, want_gradient) <= 1e-12
    assert got.positions == int((case.labels != NO_LABEL).sum())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck_of_the_reference(direction: Any) -> None:
    case = make_case("threshold", n=4, vocab=11, d=3)

    def total(z: Tensor) -> Tensor:
        return sparse_kd_reference(
            z, case.labels, case.targets, gamma=0.7, temperature=2.0, direction=direction
        ).total

    assert torch.autograd.gradcheck(total, case.logits.clone().requires_grad_())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradient_is_the_equation_of_the_design(temperature: float) -> None:
    """q_j - w_j on the ids, q_j (1 - w_tail / (1 - Q)) off them; T^2 scales it as it scales the loss."""
    case = make_case("topk", n=6)
    _, zero = logit_gradient(case, gamma=0.0, temperature=temperature)
    _, both = logit_gradient(case, gamma=1.0, temperature=temperature)
    live = case.labels != NO_LABEL
    s = (case.logits / temperature).softmax(1)[live]
    ids = case.targets.ids[live].long()
    w, w_tail = case.targets.logprobs[live].double().exp(), case.targets.tail[live].double().exp()
    mass = w.sum(1) + w_tail
    kept_mass = s.gather(1, ids).sum(1)
    want = s * (mass - w_tail / (1 - kept_mass))[:, None]
    want.scatter_(1, ids, mass[:, None] * s.gather(1, ids) - w)
    assert relative((both - zero)[live], temperature**2 * want / temperature) <= 1e-10


# ---------------------------------------------------------------- the chunked loss against it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(
    ("scheme", "direction"),
    [(s, "forward") for s in SCHEMES] + [(s, "reverse") for s in BUCKETS],
)
def test_chunked_equals_the_reference(
    scheme: str, direction: Any, temperature: float, dtype: torch.dtype
) -> None:
    for n, vocab, d, k in LINEAR_SIZES:
        case = make_case(scheme, n=n, vocab=vocab, d=d, k=k, seed=k)
        assert_equals_reference(case, dtype, gamma=0.7, temperature=temperature, direction=direction)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 9),
    vocab=st.integers(2, 40),
    d=st.integers(1, 6),
    scheme=st.sampled_from(SCHEMES),
    temperature=st.floats(0.1, 10),
    gamma=st.floats(0, 3),
    seed=st.integers(0, 999),
)
def test_any_shape_equals_the_reference(
    n: int, vocab: int, d: int, scheme: str, temperature: float, gamma: float, seed: int
) -> None:
    case = make_case(scheme, n=n, vocab=vocab, d=d, k=1 + seed % (vocab - 1), seed=seed)
    assert_equals_reference(case, bound=1e-10, gamma=gamma, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck_of_the_chunked_loss(temperature: float) -> None:
    case = make_case("threshold", n=4, vocab=11, d=3)
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_sparse_kd(
            hidden, weight, case.labels, case.targets,
            gamma=0.7, temperature=temperature, bias=bias,
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows", [1, 4, 23, 4096])
def test_chunks_do_not_change_the_result(
    rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    inner = losses._loss_and_gradient_

    def spy(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(z))
        return inner(z, *rest)

    monkeypatch.setattr(losses, "_loss_and_gradient_", spy)
    monkeypatch.setattr(losses, "MAX_CHUNK_ROWS", 4096)
    monkeypatch.setattr(losses, "CPU_LOGIT_BYTES", rows * 97 * 8)  # float64
    case = make_case("pps")
    assert_equals_reference(case, gamma=0.7, temperature=temperature)
    labelled = int((case.labels != NO_LABEL).sum())
    assert sum(seen) == labelled
    assert max(seen) <= rows
    assert len(seen) == math.ceil(labelled / rows)  # else the memory bound is not what sets them


@pytest.mark.parametrize("vocab", [15, 16, 17, 1000, 4096, 49152])
def test_softmax_into_its_own_input_is_safe(vocab: int) -> None:
    """`_tail_softmax_` relies on it; widths around and far above a vector register and a cache line."""
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, vocab, dtype=dtype, generator=torch.Generator().manual_seed(vocab)) * 5
        x[:, ::7] = NEG_INF
        x[0, 0] = 9.0
        want = torch.softmax(x, 1)
        torch.softmax(x, 1, out=x)
        assert torch.equal(x, want)


# ---------------------------------------------------------------- named edges


def test_one_kept_id() -> None:
    for scheme in SCHEMES:
        assert_equals_reference(make_case(scheme, k=1), gamma=0.7, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ids_that_cover_the_vocabulary_have_no_tail(temperature: float, dtype: torch.dtype) -> None:
    case = make_case("topk", vocab=17, k=17)
    case = replace(case, targets=replace(case.targets, tail=torch.full((23,), NEG_INF)))
    assert_equals_reference(case, dtype, gamma=0.7, temperature=temperature)
    # Full coverage is dense KD, which torch states in one call.
    live = case.labels != NO_LABEL
    log_s = (case.logits / temperature).log_softmax(1)[live]
    teacher = case.targets.logprobs[live].double()
    want = F.kl_div(log_s, teacher, log_target=True, reduction="sum")
    got, _ = linear(case, gamma=0.7, temperature=temperature)
    assert relative(got.kl, want) <= 1e-12


def test_full_coverage_with_a_tail_is_refused_forward_and_finite_reversed() -> None:
    case = make_case("topk", n=3, vocab=7, k=7)
    case = replace(case, targets=replace(case.targets, tail=torch.full((3,), math.log(1e-7))))
    with pytest.raises(ValueError, match=r"position 0 has ids for all 7 tokens and yet a tail"):
        linear(case, gamma=1.0)
    assert_equals_reference(case, gamma=1.0, direction="reverse")


def test_label_inside_and_outside_the_ids() -> None:
    case = make_case("topk", n=8)
    inside = replace(case, labels=case.targets.ids[:, 2].long())
    free = [min(set(range(97)) - set(row)) for row in case.targets.ids.tolist()]
    for labels in (inside.labels, torch.tensor(free)):
        assert_equals_reference(replace(case, labels=labels), gamma=0.7)


@pytest.mark.parametrize("row", [[3, 3, 9], [3, 9, 3], [3, -1, 3]])
def test_duplicate_ids_are_refused_with_their_position(row: list[int]) -> None:
    """The prototype gave 4 % of loss and 5 % of gradient error in silence."""
    case = make_case("topk", n=4, k=3)
    labels = torch.tensor([0, NO_LABEL, 1, 2])
    ids = case.targets.ids.clone()
    ids[2] = torch.tensor(row)
    case = replace(case, labels=labels, targets=replace(case.targets, ids=ids))
    for call in (linear, dense):
        with pytest.raises(ValueError, match=r"position 2 has id 3 twice"):
            call(case, gamma=1.0)
    ids[1] = ids[2]
    ids[2] = torch.tensor([3, 4, 9])
    linear(case, gamma=1.0)  # position 1 has no label: it is not looked at


def test_ids_in_any_order_mean_the_same() -> None:
    case = make_case("topk")
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    shuffled = SparseTargets(case.targets.ids[:, order], case.targets.logprobs[:, order], case.targets.tail)
    want, want_gradients = linear(case, gamma=0.7)
    got, gradients = linear(replace(case, targets=shuffled), gamma=0.7)
    assert relative(got.total, want.total) <= 1e-14
    assert all(relative(a, b) <= 1e-13 for a, b in zip(gradients, want_gradients, strict=True))


@pytest.mark.parametrize("where", ["last", "first", "between", "everywhere"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_never_stands_for_token_0(where: str, temperature: float) -> None:
    """Padding read or written through id 0 left token 0 out of the softmax: CE 5.591 for 5.597."""
    case = make_case("topk", n=4, vocab=7, k=2)
    case = replace(case, weight=case.weight.clone())
    case.weight[0] *= 3  # make token 0 count
    want = targets_of([({0: 0.5, 3: 0.3}, 0.2), ({3: 0.8}, 0.2), ({}, 0.0), ({}, 1.0)])
    slots = {
        "last": [0, 1, -1, -1],
        "first": [-1, -1, 0, 1],
        "between": [0, -1, 1, -1],
        "everywhere": [-1, 0, -1, 1],
    }[where]
    ids, log_weights = torch.full((4, 4), -1).int(), torch.full((4, 4), NEG_INF)
    for slot, source in enumerate(slots):
        if source >= 0:
            ids[:, slot] = want.ids[:, source]
            log_weights[:, slot] = want.logprobs[:, source]
    padded = replace(case, targets=SparseTargets(ids, log_weights, want.tail))
    case = replace(case, targets=want)
    ce, kl = one_hot_loss(case.logits, case, 1.0, temperature, "forward")
    for got, gradients in (linear(padded, gamma=1.0, temperature=temperature),
                           dense(padded, gamma=1.0, temperature=temperature)):  # fmt: skip
        assert relative(got.ce, ce) <= 1e-12
        assert relative(got.kl, kl) <= 1e-12
        for mine, true in zip(gradients, dense(case, gamma=1.0, temperature=temperature)[1], strict=True):
            assert relative(mine, true) <= 1e-12


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.integers(1, 9), seed=st.integers(0, 99), scheme=st.sampled_from(SCHEMES))
def test_wider_padding_changes_nothing(extra: int, seed: int, scheme: str) -> None:
    case = make_case(scheme, n=9, vocab=31, seed=seed)
    wide = SparseTargets(
        F.pad(case.targets.ids, (0, extra), value=PADDING_ID),
        F.pad(case.targets.logprobs, (0, extra), value=NEG_INF),
        case.targets.tail,
    )
    want, want_gradients = linear(case, gamma=0.7, temperature=2.0)
    got, gradients = linear(replace(case, targets=wide), gamma=0.7, temperature=2.0)
    assert relative(got.total, want.total) <= 1e-14
    assert all(relative(a, b) <= 1e-13 for a, b in zip(gradients, want_gradients, strict=True))


def test_rows_without_targets_have_cross_entropy_alone() -> None:
    case = make_case("topk")
    targets = SparseTargets(
        torch.full((23, 5), PADDING_ID).int(), torch.full((23, 5), NEG_INF), torch.full((23,), NEG_INF)
    )
    case = replace(case, targets=targets)
    for direction in ("forward", "reverse"):
        for temperature in (1.0, 2.0):
            got, gradients = linear(case, gamma=5.0, temperature=temperature, direction=direction)
            _, want_gradients = linear(case, gamma=0.0)
            assert float(got.kl) == 0.0
            assert relative(got.total, F.cross_entropy(case.logits, case.labels, reduction="sum")) <= 1e-12
            assert all(relative(a, b) <= 1e-12 for a, b in zip(gradients, want_gradients, strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tail", [1e-7, 1e-4, 0.9999])
def test_tail_of_any_weight(tail: float, dtype: torch.dtype, direction: Any) -> None:
    case = make_case("topk")
    head = case.targets.logprobs.double().exp()
    head = head / head.sum(1, keepdim=True) * (1 - tail)
    targets = replace(case.targets, logprobs=head.log().float(), tail=torch.full((23,), math.log(tail)))
    assert_equals_reference(
        replace(case, targets=targets), dtype, gamma=0.7, temperature=2.0, direction=direction
    )


def test_tail_of_weight_zero_is_the_sum_over_the_ids() -> None:
    case = make_case("topk")
    log_head = case.targets.logprobs.log_softmax(1)
    targets = replace(case.targets, logprobs=log_head, tail=torch.full((23,), NEG_INF))
    case = replace(case, targets=targets)
    assert_equals_reference(case, gamma=0.7, temperature=2.0)
    live = case.labels != NO_LABEL
    log_s = (case.logits / 2).log_softmax(1).gather(1, case.targets.ids.long())
    want = (log_head.double().exp() * (log_head.double() - log_s))[live].sum()
    assert relative(linear(case, gamma=0.7, temperature=2.0)[0].kl, want) <= 1e-12


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("nats", [20, 50, 100, 300])
def test_student_tail_far_below_the_ids(nats: int, temperature: float, direction: Any) -> None:
    """1 - sum(kept) is 0 from 17 nats in float32: KL infinite, and a gradient of NaN."""
    case = make_case("topk", n=11)
    bias = case.bias.clone()
    bias[:5] += nats
    ids = torch.arange(5, dtype=torch.int32).expand(11, 5)
    case = replace(case, bias=bias, targets=replace(case.targets, ids=ids))
    options = {"gamma": 0.7, "temperature": temperature, "direction": direction}
    assert_equals_reference(case, **options)
    assert_equals_reference(case, torch.float32, bound=2e-5, **options)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_logits_of_200_nats(temperature: float) -> None:
    case = make_case("topk")
    case = replace(case, weight=case.weight * (200 / case.logits.abs().max()))
    assert_equals_reference(case, gamma=0.7, temperature=temperature)
    assert_equals_reference(case, torch.float32, bound=2e-5, gamma=0.7, temperature=temperature)


def test_a_common_offset_of_the_logits_costs_no_digits() -> None:
    """Logits near 1000 that differ by a few nats: CE as a difference of raw numbers loses 4 digits."""
    case = make_case("topk", d=1)
    case = replace(case, hidden=torch.ones_like(case.hidden), weight=torch.zeros_like(case.weight))
    case = replace(case, bias=(1000 + case.bias).float().double())
    for temperature in (1.0, 0.1):
        assert_equals_reference(case, torch.float32, gamma=0.7, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.1, 10.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_temperatures_far_from_one(scheme: str, temperature: float) -> None:
    case = make_case(scheme)
    assert_equals_reference(case, gamma=0.7, temperature=temperature)
    assert_equals_reference(case, torch.float32, gamma=0.7, temperature=temperature)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_masked_by_a_bias_of_minus_infinity(temperature: float, direction: Any) -> None:
    """A vocabulary padded to a multiple of 64 is often closed like this; its entries get no gradient."""
    case = make_case("topk", vocab=90)
    bias = torch.cat([case.bias, torch.full((7,), NEG_INF, dtype=torch.float64)])
    weight = torch.cat([case.weight, torch.ones(7, 13, dtype=torch.float64)])
    options: dict[str, Any] = {"gamma": 0.7, "temperature": temperature, "direction": direction}
    want, want_gradients = linear(case, **options)
    got, gradients = linear(replace(case, weight=weight, bias=bias), **options)
    assert relative(got.total, want.total) <= 1e-12
    assert relative(gradients[0], want_gradients[0]) <= 1e-12
    assert relative(gradients[1][:90], want_gradients[1]) <= 1e-12
    assert gradients[1][90:].abs().max() == 0
    assert gradients[2][90:].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_off_the_ids_is_there(temperature: float) -> None:
    """Losses that gather the kept logits and forget the rest leave it 0: the normaliser is missing."""
    case = make_case("pps", n=6, d=6)
    case = replace(case, hidden=torch.eye(6, dtype=torch.float64))
    case = replace(case, labels=torch.zeros(6, dtype=torch.int64))
    _, with_kl = linear(case, gamma=1.0, temperature=temperature)
    _, ce_only = linear(case, gamma=0.0, temperature=temperature)
    of_kl = (with_kl[1] - ce_only[1]).t()  # hidden = identity: row i is position i's logit gradient
    s = ((case.weight + case.bias[:, None]).t() / temperature).softmax(1)
    for i, ids in enumerate(case.targets.ids.tolist()):
        off = [v for v in range(97) if v not in ids]
        assert relative(of_kl[i, off], temperature * s[i, off]) <= 1e-6  # weights are float32


def test_temperature_squared_scales_the_gradient_as_it_scales_the_loss() -> None:
    """Doubling T and the logits with it leaves KL as it is: total and gradient carry T^2 / T."""
    case = make_case("topk")
    twice = replace(case, weight=2 * case.weight, bias=2 * case.bias)
    one, one_gradients = linear(case, gamma=1.0, temperature=1.0)
    two, two_gradients = linear(twice, gamma=1.0, temperature=2.0)
    _, one_ce = linear(case, gamma=0.0)
    _, two_ce = linear(twice, gamma=0.0)
    assert relative(two.kl, one.kl) <= 1e-12
    assert relative(two.total - two.ce, 4 * (one.total - one.ce)) <= 1e-12
    assert relative(two_gradients[2] - two_ce[2], 2 * (one_gradients[2] - one_ce[2])) <= 1e-11


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 999),
    scheme=st.sampled_from(BUCKETS),
    temperature=st.floats(0.1, 10),
    direction=st.sampled_from(["forward", "reverse"]),
)
def test_kl_of_a_bucket_is_never_negative(seed: int, scheme: str, temperature: float, direction: Any) -> None:
    case = make_case(scheme, n=5, vocab=29, seed=seed)
    loss, _ = linear(case, gamma=1.0, temperature=temperature, direction=direction)
    assert float(loss.kl) >= -1e-6  # weights rounded to float32 sum to 1 within 1e-7
    assert float(loss.ce) >= 0


def test_kl_is_zero_where_the_student_is_the_teacher() -> None:
    case = make_case("topk", k=9)
    log_q = case.logits.log_softmax(1).gather(1, case.targets.ids.long())
    tail = torch.log1p(-log_q.exp().sum(1))
    targets = SparseTargets(case.targets.ids, log_q.float(), tail.float())
    case = replace(case, targets=targets)
    for direction in ("forward", "reverse"):
        loss, gradients = linear(case, gamma=1.0, direction=direction)
        _, of_ce = linear(case, gamma=0.0)
        assert abs(float(loss.kl)) <= 1e-6
        assert all(relative(a, b) <= 1e-6 for a, b in zip(gradients, of_ce, strict=True))


# ---------------------------------------------------------------- logit soft-cap


def capped_dense(case: Case, cap: float, **options: Any) -> tuple[SparseKdLoss, list[Tensor]]:
    """The reference on logits capped outside, by autograd: what `linear(softcap=cap)` must equal."""
    inputs = [x.detach().double().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    z = cap * torch.tanh(F.linear(*inputs) / cap)
    loss = sparse_kd_reference(z, case.labels, case.targets, **options)
    return loss, list(torch.autograd.grad(loss.total, inputs))


def assert_equals_capped(
    case: Case, cap: float, dtype: torch.dtype = torch.float64, bound: float | None = None, **options: Any
) -> None:
    bound = BOUND[dtype] if bound is None else bound
    want, want_gradients = capped_dense(replaced(case, dtype), cap, **options)
    got, gradients = linear(case, dtype, softcap=cap, **options)
    for name in ("total", "ce", "kl"):
        assert relative(getattr(got, name), getattr(want, name)) <= bound, name
    for mine, true in zip(gradients, want_gradients, strict=True):
        assert relative(mine, true) <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(
    ("scheme", "direction"), [("topk", "forward"), ("pps", "forward"), ("topk", "reverse")]
)
def test_softcap_equals_the_reference_on_capped_logits(
    scheme: str, direction: Any, temperature: float, dtype: torch.dtype
) -> None:
    """Logits of 4 nats under caps of 1.5 and 30; T divides what the cap has let through."""
    for cap in (1.5, 30.0):
        options = {"gamma": 0.7, "temperature": temperature, "direction": direction}
        assert_equals_capped(make_case(scheme), cap, dtype, **options)


def test_gradcheck_with_a_softcap() -> None:
    case = make_case("threshold", n=4, vocab=11, d=3)
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_sparse_kd(
            hidden, weight, case.labels, case.targets, gamma=0.7, temperature=2.0, bias=bias, softcap=1.5
        ).total

    assert torch.autograd.gradcheck(total, inputs)


def test_logits_far_above_the_cap_keep_the_digits_of_their_gradient() -> None:
    """At 6 to 8 caps the slope is 1e-5 to 1e-7; 1 - tanh^2 in float32 errs by 6e-8, which is 1e-3 of it."""
    case = make_case("topk", d=1)
    gen = torch.Generator().manual_seed(5)
    logits = (60 + 20 * torch.rand(97, generator=gen)).double() * torch.tensor([1.0, -1.0]).repeat(49)[:97]
    case = replace(case, hidden=torch.ones_like(case.hidden), weight=logits[:, None], bias=0 * case.bias)
    for temperature in (1.0, 2.0):
        assert_equals_capped(case, 10.0, torch.float32, bound=1e-5, gamma=0.7, temperature=temperature)
    far = replace(case, weight=1e6 * case.weight)  # cosh overflows
    _, gradients = linear(far, torch.float32, gamma=0.7, softcap=10.0)
    assert all(float(x.abs().max()) == 0 for x in gradients)


def test_a_softcap_far_above_the_logits_does_nothing() -> None:
    case = make_case("topk")
    plain, plain_gradients = linear(case, gamma=0.7)
    got, gradients = linear(case, gamma=0.7, softcap=1e7)
    assert relative(got.total, plain.total) <= 1e-12
    assert all(relative(a, b) <= 1e-11 for a, b in zip(gradients, plain_gradients, strict=True))


def test_under_a_softcap_a_bias_of_minus_infinity_is_minus_the_cap() -> None:
    case = make_case("topk")
    bias = case.bias.clone()
    bias[90:] = NEG_INF
    assert_equals_capped(replace(case, bias=bias), 3.0, gamma=0.7)


def test_softcap_without_grad_has_the_same_values() -> None:
    case = make_case("topk")
    want, _ = linear(case, gamma=0.7, temperature=2.0, softcap=1.5)
    got = linear_sparse_kd(
        case.hidden, case.weight, case.labels, case.targets,
        gamma=0.7, temperature=2.0, bias=case.bias, softcap=1.5,
    )  # fmt: skip
    assert torch.equal(got.total, want.total)
    assert torch.equal(got.kl, want.kl)


def test_softcap_is_put_around_the_triton_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch in the kernel's place: the cap comes before it, the slope after."""

    def kernel(z: Tensor, batch: Any, terms: Any, want: bool) -> tuple[Tensor, Tensor]:
        return losses._loss_and_gradient_(z, batch, terms, None, want)

    monkeypatch.setattr(losses, "_triton_loss_and_gradient_", kernel)
    monkeypatch.setattr(losses, "_check_implementation", lambda name, *_: name == "triton")
    case = make_case("topk")
    want, want_gradients = capped_dense(case, 1.5, gamma=0.7)
    got, gradients = linear(case, gamma=0.7, softcap=1.5, implementation="triton")
    assert relative(got.total, want.total) <= 1e-12
    assert all(relative(a, b) <= 1e-12 for a, b in zip(gradients, want_gradients, strict=True))


# ---------------------------------------------------------------- padded vocabularies


def padded_student(case: Case, rows: int) -> Case:
    """The student with `rows` more tokens than the teacher has ids for; labels and targets stay."""
    gen = torch.Generator().manual_seed(9)
    more = torch.randn(rows, case.weight.shape[1], dtype=torch.float64, generator=gen)
    return replace(
        case,
        weight=torch.cat([case.weight, more]),
        bias=torch.cat([case.bias, torch.randn(rows, dtype=torch.float64, generator=gen)]),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_student_with_more_tokens_than_the_teacher(scheme: str, temperature: float) -> None:
    case = padded_student(make_case(scheme), 31)
    assert case.weight.shape[0] == 128
    assert_equals_reference(case, gamma=0.7, temperature=temperature)
    ce, kl = one_hot_loss(case.logits, case, 0.7, temperature, "forward")
    got, _ = linear(case, gamma=0.7, temperature=temperature)
    assert relative(got.ce, ce) <= 1e-12
    assert relative(got.kl, kl) <= 1e-12


def test_rows_beyond_the_teachers_ids_have_softmax_mass_like_any_other() -> None:
    """CE pulls them down by q; without a tail KL does so by its own s."""
    case = make_case("pps", n=6, d=6)
    case = replace(case, hidden=torch.eye(6, dtype=torch.float64), labels=torch.zeros(6, dtype=torch.int64))
    case = padded_student(case, 31)
    q = case.logits.softmax(1)
    assert float(q[:, 97:].sum(1).min()) > 0.01
    _, (_, of_ce, _) = linear(case, gamma=0.0)
    _, (_, of_both, _) = linear(case, gamma=1.0)
    assert relative(of_ce[97:].t(), q[:, 97:]) <= 1e-12  # hidden = identity: column i is position i
    assert relative(of_both[97:].t(), 2 * q[:, 97:]) <= 1e-6  # the teacher's weights are float32


def test_ids_of_the_whole_teacher_leave_a_padded_student_a_tail() -> None:
    case = padded_student(make_case("topk", vocab=17, k=17), 4)
    targets = replace(case.targets, tail=torch.full((23,), math.log(1e-4)))
    assert_equals_reference(replace(case, targets=targets), gamma=0.7, temperature=2.0)


# ---------------------------------------------------------------- gradient skipping

TAU = 0.03  # of a gradient whose entries lie within [-1.7, 1.7]


def concentrated_case(n: int = 11, vocab: int = 1500) -> Case:
    """Peaked like a language model: few of the 1500 entries of a row matter."""
    return make_case("topk", n=n, vocab=vocab, d=9, k=17, seed=3, scale=0.9)


def always_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_skip, "BREAK_EVEN_SHARE", float("inf"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_logit_gradient(case: Case, **options: Any) -> Tensor:
    """G [N, V] in float64."""
    return logit_gradient(case, **options)[1]


def mean_of_draws(case: Case, draws: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Mean gradients of hidden and weight over the draws, and the mean square of either one's error."""
    _, exact = linear(case, dtype, gamma=0.7)
    sums = [torch.zeros_like(x) for x in exact[:2]]
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(draws):
        _, got = linear(case, dtype, gamma=0.7, gradient_skip=TAU, generator=seeded(seed))
        for i in range(2):
            sums[i] += got[i]
            squares[i] += (got[i] - exact[i]).double().square().sum()
        assert torch.equal(got[2], exact[2])  # bias
    return [x / draws for x in sums], squares / draws


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_skipping_is_unbiased_and_its_error_is_the_stated_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean of 400 draws, bound 3 sigma of it. Dropping the same elements misses it by a wide margin."""
    always_skip(monkeypatch)
    case, draws = concentrated_case(), 400
    g = dense_logit_gradient(case, gamma=0.7)
    exact = [g @ case.weight, g.t() @ case.hidden]
    variance = g.abs() * (TAU - g.abs()).clamp_min(0)
    stated = [
        (variance.sum(0) * case.weight.square().sum(1)).sum(),
        (variance.sum(1) * case.hidden.square().sum(1)).sum(),
    ]
    means, squares = mean_of_draws(case, draws, dtype)
    dropped = torch.where(g.abs() < TAU, 0.0, g)
    biased = [dropped @ case.weight, dropped.t() @ case.hidden]
    for mean, square, true, bias, error in zip(means, squares, exact, biased, stated, strict=True):
        bound = 3 * math.sqrt(error / draws)
        assert float((mean.double() - true).norm()) <= bound
        assert float((bias - true).norm()) > 3 * bound  # the test has teeth
        assert float(square) == pytest.approx(float(error), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_skipping_with_a_threshold_of_almost_0_is_exact(
    temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_skip(monkeypatch)
    case = concentrated_case()
    for options in ({}, {"softcap": 5.0}, {"direction": "reverse"}):
        common: dict[str, Any] = {"gamma": 0.7, "temperature": temperature, **options}
        want, want_gradients = linear(case, dtype, **common)
        got, gradients = linear(case, dtype, gradient_skip=1e-30, **common)
        assert torch.equal(got.total, want.total)
        assert not torch.equal(gradients[1], want_gradients[1])  # it did take the other products
        for mine, true in zip(gradients, want_gradients, strict=True):
            assert relative(mine, true) <= BOUND[dtype]


def test_skipping_leaves_the_loss_and_the_bias_gradient_as_they_are() -> None:
    case = concentrated_case()
    want, want_gradients = linear(case, gamma=0.7)
    got, gradients = linear(case, gamma=0.7, gradient_skip=TAU, generator=seeded(0))
    for name in ("total", "ce", "kl"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(gradients[2], want_gradients[2])
    for i in range(2):
        assert 1e-4 < relative(gradients[i], want_gradients[i]) < 0.5


@pytest.mark.parametrize("which", [0, 1])
def test_skipping_where_one_gradient_is_wanted(which: int) -> None:
    case = concentrated_case()
    _, both = linear(case, gamma=0.7, gradient_skip=TAU, generator=seeded(4))
    inputs = [case.hidden.clone(), case.weight.clone()]
    inputs[which].requires_grad_()
    loss = linear_sparse_kd(
        inputs[0], inputs[1], case.labels, case.targets,
        gamma=0.7, bias=case.bias, gradient_skip=TAU, generator=seeded(4),
    )  # fmt: skip
    (got,) = torch.autograd.grad(loss.total, inputs[which])
    assert torch.equal(got, both[which])


def test_skipping_is_reproducible() -> None:
    case = concentrated_case()

    def weight_gradient(generator: torch.Generator | None) -> Tensor:
        return linear(case, gamma=0.7, gradient_skip=TAU, generator=generator)[1][1]

    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = weight_gradient(seeded(1))
    assert torch.equal(weight_gradient(seeded(1)), first)
    assert not torch.equal(weight_gradient(seeded(2)), first)
    assert torch.equal(torch.get_rng_state(), before)  # a generator of its own leaves the default one alone
    default = weight_gradient(None)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weight_gradient(None), default)
    torch.manual_seed(11)
    assert torch.equal(weight_gradient(None), default)


def test_a_flat_gradient_gets_exact_products_and_draws_nothing() -> None:
    case = replace(concentrated_case(), hidden=torch.zeros(11, 9, dtype=torch.float64))
    case = replace(case, bias=0 * case.bias)
    _, exact = linear(case, gamma=0.7)
    generator = seeded(1)
    before = generator.get_state()
    _, got = linear(case, gamma=0.7, gradient_skip=1e-3, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    assert torch.equal(generator.get_state(), before)


def test_each_chunk_falls_back_for_itself() -> None:
    """Five peaked positions in the first chunk, five flat ones in the second."""
    case = concentrated_case(n=10)
    hidden = 3 * case.hidden
    hidden[5:] = 0
    case = replace(case, hidden=hidden, bias=0 * case.bias, labels=case.targets.ids[:, 0].long())
    _, exact = linear(case, gamma=0.7)
    _, got = linear(case, gamma=0.7, gradient_skip=TAU / 10, generator=seeded(1))
    assert torch.equal(got[0][5:], exact[0][5:])
    assert all(not torch.equal(a, b) for a, b in zip(got[0][:5], exact[0][:5], strict=True))


def test_the_fall_back_looks_at_the_gradient_not_at_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing the draws that turn out dense would bias those that remain."""
    g = dense_logit_gradient(concentrated_case(), gamma=0.7)[:1]
    share = expected_share(g, TAU)
    kept = [len(GradientSkip(TAU, seeded(i)).draw(g).values) / g.numel() for i in range(50)]
    assert min(kept) < share < max(kept)
    assert sum(kept) / 50 == pytest.approx(share, rel=0.05)
    for break_even, pays in ((share * 1.001, True), (share * 0.999, False)):
        monkeypatch.setattr(gradient_skip, "BREAK_EVEN_SHARE", break_even)
        assert GradientSkip(TAU).pays(g) is pays


def test_skipping_draws_nothing_where_no_gradient_is_formed() -> None:
    case, generator = concentrated_case(), seeded(1)
    before = generator.get_state()
    plain = (case.hidden, case.weight, case.labels, case.targets)
    linear_sparse_kd(*plain, gamma=0.7, gradient_skip=TAU, generator=generator)
    bias = case.bias.clone().requires_grad_()
    linear_sparse_kd(*plain, gamma=0.7, bias=bias, gradient_skip=TAU, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_skipping_with_nothing_labelled() -> None:
    _, gradients = linear(ignored(concentrated_case()), gamma=0.7, gradient_skip=TAU)
    assert all(float(x.abs().max()) == 0 for x in gradients)


def test_skipping_does_not_hide_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """|NaN| >= threshold is false: a survivor mask by >= would drop every NaN and train on."""
    always_skip(monkeypatch)
    case = concentrated_case()
    hidden = case.hidden.clone()
    hidden[2, 0] = float("nan")
    _, gradients = linear(replace(case, hidden=hidden), gamma=0.7, gradient_skip=TAU)
    assert gradients[0][2].isnan().all()
    assert gradients[1].isnan().all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 9),
    vocab=st.integers(1, 40),
    block=st.sampled_from([1, 7, 64, 100, 2**19]),
    tau=st.floats(1e-3, 3),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(n=5, vocab=30, block=100, tau=0.5, seed=0, dtype=torch.float32)  # the last block is shorter
def test_survivors_of_any_shape(
    n: int, vocab: int, block: int, tau: float, seed: int, dtype: torch.dtype
) -> None:
    """Elements of tau or more stay, others are 0 or +-tau; the products are those of the dense matrix."""
    gen = seeded(seed)
    g, weight, hidden = (torch.randn(s, dtype=dtype, generator=gen) for s in ((n, vocab), (vocab, 3), (n, 3)))
    g[torch.rand(n, vocab, generator=gen) < 0.3] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_skip, "_BLOCK_ELEMENTS", block)
        patch.setattr(gradient_skip, "_BLOCK_ROWS", block)
        found = GradientSkip(tau, gen).draw(g)
        out = torch.ones(vocab, 3, dtype=dtype)
        found.add_transposed_times_(out, hidden)
    dense_found = to_dense(found, n, vocab)
    limit = torch.tensor(tau, dtype=dtype)
    large = g.abs() >= limit
    assert torch.equal(dense_found[large], g[large])
    small = dense_found[~large]
    assert torch.equal(small[small != 0], (g[~large].sign() * limit)[small != 0])
    assert bool((g[dense_found != 0] != 0).all())
    assert relative(found.times(weight), dense_found.double() @ weight.double()) <= 1e-5
    assert relative(out, 1 + dense_found.double().t() @ hidden.double()) <= 1e-5


def to_dense(found: Survivors, n: int, vocab: int) -> Tensor:
    """By the row starts, so that they are checked against `rows` as well."""
    out = found.values.new_zeros(n, vocab)
    for row in range(n):
        part = slice(int(found.starts[row]), int(found.starts[row + 1]))
        assert bool((found.rows[part] == row).all())
        out[row, found.columns[part]] = found.values[part]
    return out


def test_thresholds_are_uniform_independent_in_rows_and_columns_and_finer_than_float32() -> None:
    t = gradient_skip._thresholds(torch.empty(300, 2000), 1.0, seeded(0))
    assert t.shape == (300, 2000)
    assert 0 < float(t.min()) < 1e-4
    assert 0.9999 < float(t.max()) < 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02)
    steps = t * 2**24
    assert not torch.equal(steps, steps.round())
    assert len(set(t[0].tolist())) == 2000
    assert len(set(t[:, 0].tolist())) == 300


@pytest.mark.parametrize("tau", [0.0, -1e-3, float("nan"), float("inf")])
def test_impossible_thresholds_are_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"gradient_skip {tau}: expected a finite number > 0"):
        linear(make_case("topk"), gamma=1.0, gradient_skip=tau)


def test_skipping_is_refused_where_it_does_not_exist() -> None:
    case = make_case("topk")
    with pytest.raises(NotImplementedError, match=r'gradient_skip with implementation "triton"'):
        linear(case, gamma=1.0, gradient_skip=1e-3, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"gradient_skip .* on meta"):
        linear_sparse_kd(
            case.hidden.to("meta"), case.weight, case.labels, case.targets, gamma=1.0, gradient_skip=1e-3
        )


# ---------------------------------------------------------------- autograd, dtypes, layouts


@pytest.mark.parametrize("make", [lambda: make_case("topk", n=0), lambda: ignored(make_case("topk"))])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_labelled_is_zero_with_zero_gradients(make: Callable[[], Case], temperature: float) -> None:
    case = make()
    for call in (linear, dense):
        loss, gradients = call(case, gamma=0.7, temperature=temperature)
        assert loss.positions == 0
        assert [x.item() for x in (loss.total, loss.ce, loss.kl)] == [0, 0, 0]
        for gradient, x in zip(gradients, (case.hidden, case.weight, case.bias), strict=True):
            assert torch.equal(gradient, torch.zeros_like(x))


def ignored(case: Case) -> Case:
    return replace(case, labels=torch.full_like(case.labels, NO_LABEL))


def test_ignored_rows_may_hold_anything() -> None:
    case = make_case("topk")
    want, want_gradients = linear(case, gamma=0.7, temperature=2.0)
    gone = case.labels == NO_LABEL
    hidden, ids, tail = case.hidden.clone(), case.targets.ids.clone(), case.targets.tail.clone()
    hidden[gone], ids[gone], tail[gone] = float("nan"), 9999, float("nan")
    case = replace(case, hidden=hidden, targets=SparseTargets(ids, case.targets.logprobs, tail))
    got, gradients = linear(case, gamma=0.7, temperature=2.0)
    assert torch.equal(got.total, want.total)
    assert all(torch.equal(a, b) for a, b in zip(gradients, want_gradients, strict=True))
    assert gradients[0][gone].abs().max() == 0
    _, z_gradient = logit_gradient(case, gamma=0.7)
    assert z_gradient[gone].abs().max() == 0


def test_another_ignore_index() -> None:
    case = make_case("topk")
    want, _ = linear(case, gamma=0.7)
    labels = case.labels.masked_fill(case.labels == NO_LABEL, -1).int()
    for call in (linear, dense):
        got, _ = call(replace(case, labels=labels), gamma=0.7, ignore_index=-1)
        assert relative(got.total, want.total) <= 1e-12
        assert got.positions == want.positions


def test_upstream_factor_reaches_every_gradient() -> None:
    case = make_case("topk")
    _, want = dense(case, upstream=3.0, gamma=0.7)
    _, got = linear(case, upstream=3.0, gamma=0.7)
    assert all(relative(a, b) <= 1e-12 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("all_labelled", [False, True])
def test_backward_twice_doubles_the_gradients(upstream: float, all_labelled: bool) -> None:
    case = make_case("topk")
    if all_labelled:
        case = replace(case, labels=case.labels.clamp_min(0))
    _, want = dense(case, upstream=upstream, gamma=0.7)
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = linear_sparse_kd(inputs[0], inputs[1], case.labels, case.targets, gamma=0.7, bias=inputs[2])
    total = loss.total * upstream
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    total.backward()  # type: ignore[no-untyped-call]
    for x, gradient in zip(inputs, want, strict=True):
        assert x.grad is not None
        assert relative(x.grad, 2 * gradient) <= 1e-12


def test_a_gradient_that_was_handed_out_is_never_written_again() -> None:
    """The last backward scales what forward saved in place; one that may be followed by another must not."""
    case = make_case("topk")
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = linear_sparse_kd(leaves[0], leaves[1], case.labels, case.targets, gamma=0.7, bias=leaves[2])
    results = [
        torch.autograd.grad(factor * loss.total, leaves, retain_graph=kept)
        for factor, kept in ((1.0, True), (3.0, True), (0.0, True), (2.0, False))
    ]
    _, want = dense(case, gamma=0.7)
    for factor, result in zip((1.0, 3.0, 0.0, 2.0), results, strict=True):
        for got, one in zip(result, want, strict=True):
            assert float((got - factor * one).norm()) <= 1e-12 * float(one.norm())
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(2 * loss.total, leaves)


def test_backward_is_right_where_torch_does_not_say_whether_the_graph_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    test_backward_twice_doubles_the_gradients(3.0, True)


@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_backward_makes_no_second_weight_gradient(upstream: float) -> None:
    """dweight is the largest tensor that the loss needs; the profiler sees every allocation of backward."""
    case = make_case("topk", n=10, vocab=5000, d=64)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    total = upstream * linear_sparse_kd(hidden, weight, case.labels, case.targets, gamma=1.0).total
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert max(event.cpu_memory_usage for event in recorded.events()) < weight.nbytes / 10


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_gradients_only_where_they_are_wanted(which: tuple[int, ...]) -> None:
    case = make_case("topk")
    _, want = dense(case, gamma=0.7)
    inputs = [x.clone() for x in (case.hidden, case.weight, case.bias)]
    for i in which:
        inputs[i].requires_grad_()
    linear_sparse_kd(
        inputs[0], inputs[1], case.labels, case.targets, gamma=0.7, bias=inputs[2]
    ).total.backward()  # type: ignore[no-untyped-call]
    for i, (x, gradient) in enumerate(zip(inputs, want, strict=True)):
        assert (x.grad is not None) == (i in which)
        if x.grad is not None:
            assert relative(x.grad, gradient) <= 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_grad_the_values_are_the_same_and_no_gradient_is_formed(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("threshold")
    want, _ = linear(case, gamma=0.7, temperature=temperature)
    wanted: list[bool] = []
    inner = losses._loss_and_gradient_

    def spy(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        wanted.append(rest[-1])
        return inner(z, *rest)

    monkeypatch.setattr(losses, "_loss_and_gradient_", spy)
    plain = (case.hidden, case.weight, case.labels, case.targets)
    options: dict[str, Any] = {"gamma": 0.7, "temperature": temperature, "bias": case.bias}
    loss = [linear_sparse_kd(*plain, **options)]
    with torch.no_grad():
        leaf = case.hidden.clone().requires_grad_()
        loss.append(linear_sparse_kd(leaf, *plain[1:], **options))
    assert wanted
    assert not any(wanted)
    for got in loss:
        assert not got.total.requires_grad
        for name in ("total", "ce", "kl"):
            assert torch.equal(getattr(got, name), getattr(want, name))


def test_ce_and_kl_are_detached_and_add_up() -> None:
    loss, _ = linear(make_case("topk"), gamma=0.7, temperature=2.0)
    assert loss.total.requires_grad
    assert not loss.ce.requires_grad
    assert not loss.kl.requires_grad
    assert relative(loss.total.detach(), loss.ce + 0.7 * 4 * loss.kl) <= 1e-15


def test_second_derivatives_are_refused() -> None:
    case = make_case("topk")
    hidden = case.hidden.clone().requires_grad_()
    loss = linear_sparse_kd(hidden, case.weight, case.labels, case.targets, gamma=0.7)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss.total, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_targets_it_is_cross_entropy(dtype: torch.dtype) -> None:
    case = make_case("topk")
    inputs = [x.to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    want = F.cross_entropy(F.linear(*inputs), case.labels, reduction="sum")
    want_gradients = torch.autograd.grad(want, inputs)
    for temperature in (1.0, 2.0):
        got = linear_sparse_kd(
            inputs[0], inputs[1], case.labels, None,
            gamma=0.0, temperature=temperature, bias=inputs[2],
        )  # fmt: skip
        assert relative(got.total.detach(), want.detach()) <= BOUND[dtype]
        assert torch.equal(got.total.detach(), got.ce)
        assert float(got.kl) == 0
        for a, b in zip(torch.autograd.grad(got.total, inputs), want_gradients, strict=True):
            assert relative(a, b) <= BOUND[dtype]
    dense_loss = sparse_kd_reference(case.logits, case.labels, None, gamma=0.0)
    assert relative(dense_loss.total, want.detach()) <= BOUND[dtype]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gamma_zero_with_targets_still_reports_the_kl(temperature: float) -> None:
    case = make_case("topk")
    zero, gradients = linear(case, gamma=0.0, temperature=temperature)
    some, _ = linear(case, gamma=0.7, temperature=temperature)
    _, want = dense(case, gamma=0.0, temperature=temperature)
    assert torch.equal(zero.kl, some.kl)
    assert float(zero.kl) > 0
    assert torch.equal(zero.total.detach(), zero.ce)
    assert all(relative(a, b) <= 1e-12 for a, b in zip(gradients, want, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gamma_zero_is_not_touched_by_an_infinite_kl(temperature: float) -> None:
    """The teacher keeps a token that the student's bias closes: KL is infinite, and 0 * inf is NaN."""
    case = make_case("topk")
    case.bias[int(case.targets.ids[2, 0])] = NEG_INF
    case = replace(case, labels=(case.targets.ids[2, 1].long()).expand(23).clone())
    for call in (linear, dense):
        zero, gradients = call(case, gamma=0.0, temperature=temperature)
        assert zero.kl.detach() == float("inf")
        want = F.cross_entropy(case.logits, case.labels, reduction="sum")
        assert relative(zero.total, want) <= 1e-12
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_inputs_need_not_be_contiguous_and_are_not_written(temperature: float) -> None:
    case = make_case("topk")
    strided = Case(
        case.hidden.t().contiguous().t(),
        torch.stack([case.weight, case.weight], 2)[:, :, 0],
        torch.stack([case.bias, case.bias], 1)[:, 0],
        torch.stack([case.labels, case.labels], 1)[:, 0],
        SparseTargets(
            case.targets.ids.t().contiguous().t(),
            case.targets.logprobs.t().contiguous().t(),
            torch.stack([case.targets.tail] * 2, 1)[:, 0],
        ),
    )
    inputs = [strided.hidden, strided.weight, strided.bias, strided.targets.ids, strided.targets.tail]
    before = [x.clone() for x in inputs]
    assert not any(x.is_contiguous() for x in inputs)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    assert not leaves[1].is_contiguous()
    loss = linear_sparse_kd(
        leaves[0], leaves[1], strided.labels, strided.targets,
        gamma=0.7, temperature=temperature, bias=leaves[2],
    )  # fmt: skip
    _, want = dense(case, gamma=0.7, temperature=temperature)
    for a, b in zip(torch.autograd.grad(loss.total, leaves), want, strict=True):
        assert relative(a, b) <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_16_bit_weights(
    dtype: torch.dtype, bound: float, widen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widened, only the returned gradient is rounded; else the products are, as on a GPU."""
    monkeypatch.setattr(losses, "WIDENING_DEVICES", frozenset({"cpu"} if widen else ()))
    case = replaced(make_case("topk", scale=0.5), dtype)
    want, want_gradients = dense(case, gamma=0.7, temperature=2.0)
    got, gradients = linear(case, dtype, gamma=0.7, temperature=2.0)
    assert got.total.dtype == torch.float32
    assert relative(got.total, want.total) <= (2e-6 if widen else bound)
    for mine, true in zip(gradients, want_gradients, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, true) <= (bound if widen else 2 * bound)


def test_weight_gradient_accumulates_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed in bfloat16, 400 equal shares stop growing at 256 of them."""
    n, d = 400, 3
    monkeypatch.setattr(losses, "MAX_CHUNK_ROWS", 1)
    for widening in (frozenset({"cpu"}), frozenset()):
        monkeypatch.setattr(losses, "WIDENING_DEVICES", widening)
        weight = torch.zeros(8, d, dtype=torch.bfloat16, requires_grad=True)
        hidden = torch.ones(n, d, dtype=torch.bfloat16)
        labels = torch.zeros(n, dtype=torch.int64)
        linear_sparse_kd(hidden, weight, labels, None, gamma=0.0).total.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert float(weight.grad[0, 0]) == pytest.approx(n * (1 / 8 - 1), rel=4e-3)
        assert float(weight.grad[1, 0]) == pytest.approx(n / 8, rel=4e-3)


def test_autocast_rounds_the_operands_only() -> None:
    case = make_case("topk", scale=0.5)
    inputs = [x.float().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_sparse_kd(inputs[0], inputs[1], case.labels, case.targets, gamma=0.7, bias=inputs[2])
        gradients = torch.autograd.grad(got.total, inputs)
    assert got.total.dtype == torch.float32
    want, want_gradients = dense(replaced(replaced(case, torch.float32), torch.bfloat16), gamma=0.7)
    assert relative(got.total.detach(), want.total.detach()) <= 2e-6
    exact, _ = dense(case, gamma=0.7)
    assert 1e-6 < relative(got.total.detach(), exact.total.detach()) <= 1e-2  # it did round
    for mine, true in zip(gradients, want_gradients, strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, true) <= 2e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equals_reference(case, gamma=0.7)  # float64 stays float64


def test_hidden_is_cast_to_the_dtype_of_the_weight() -> None:
    case = make_case("topk")
    hidden = case.hidden.bfloat16().requires_grad_()
    got = linear_sparse_kd(hidden, case.weight, case.labels, case.targets, gamma=0.7)
    want = sparse_kd_reference(
        hidden.detach().double() @ case.weight.t(), case.labels, case.targets, gamma=0.7
    )
    assert got.total.dtype == torch.float64
    assert relative(got.total.detach(), want.total) <= 1e-12
    (gradient,) = torch.autograd.grad(got.total, hidden)
    assert gradient.dtype == torch.bfloat16


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("call", [linear, dense])
@pytest.mark.parametrize("label", [-1, -101, 97, 10**6])
def test_label_outside_the_vocabulary_is_refused(call: Any, label: int) -> None:
    case = make_case("topk")
    case.labels[4] = label
    with pytest.raises(ValueError, match=rf"position 4 has label {label}, outside .* 97 tokens"):
        call(case, gamma=1.0)


@pytest.mark.parametrize("call", [linear, dense])
@pytest.mark.parametrize("token", [-2, 97, 151_000])
def test_id_outside_the_students_vocabulary_is_refused(call: Any, token: int) -> None:
    case = make_case("topk")
    case.targets.ids[3, 4 if token > 0 else 0] = token
    with pytest.raises(ValueError, match=rf"position 3 has id {token}, outside .* 97 tokens"):
        call(case, gamma=1.0)


@pytest.mark.parametrize("call", [linear, dense])
def test_reverse_kl_needs_a_tail_and_no_weightless_id(call: Any) -> None:
    case = make_case("topk")
    case.targets.tail[7] = NEG_INF
    with pytest.raises(ValueError, match=r"position 7 has no tail, which reverse KL needs"):
        call(case, gamma=1.0, direction="reverse")
    call(case, gamma=1.0)
    case = make_case("topk")
    case.targets.logprobs[7, 2] = NEG_INF
    with pytest.raises(ValueError, match=r"position 7 has an id of weight 0"):
        call(case, gamma=1.0, direction="reverse")
    assert_equals_reference(case, gamma=1.0, temperature=2.0)


@pytest.mark.parametrize("call", [linear, dense])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"gamma": -0.5}, "gamma -0.5"),
        ({"gamma": float("inf")}, "gamma inf"),
        ({"direction": "backward"}, "direction 'backward'"),
    ],
)
def test_impossible_options_are_refused(call: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(make_case("topk"), **({"gamma": 1.0} | options))


@pytest.mark.parametrize("cap", [0.0, -30.0, float("nan"), float("inf")])
def test_impossible_caps_are_refused(cap: float) -> None:
    with pytest.raises(ValueError, match=rf"softcap {cap}: expected a finite number > 0"):
        linear(make_case("topk"), gamma=1.0, softcap=cap)


def test_implementations() -> None:
    case = make_case("topk")
    auto, _ = linear(case, gamma=1.0)
    chunked, _ = linear(case, gamma=1.0, implementation="chunked")
    assert torch.equal(auto.total, chunked.total)
    with pytest.raises(ValueError, match="implementation 'fused'"):
        linear(case, gamma=1.0, implementation="fused")


def test_no_targets_needs_gamma_zero() -> None:
    case = make_case("topk")
    with pytest.raises(ValueError, match=r"no targets, gamma 0\.5"):
        linear_sparse_kd(case.hidden, case.weight, case.labels, None, gamma=0.5)
    with pytest.raises(ValueError, match=r"no targets, gamma 0\.5"):
        sparse_kd_reference(case.logits, case.labels, None, gamma=0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden": torch.zeros(2, 23, 13)}, r"hidden has shape \[2, 23, 13\]: expected \[N, d\]"),
        ({"hidden": torch.zeros(23, 12)}, r"weight has shape \[97, 13\]: expected \[97, 12\]"),
        ({"weight": torch.zeros(13)}, r"weight has shape \[13\]: expected \[13, 13\]"),
        ({"weight": torch.zeros(0, 13)}, r"weight has no rows"),
        ({"bias": torch.zeros(96)}, r"bias has shape \[96\]: expected \[97\]"),
        ({"labels": torch.zeros(22).long()}, r"labels has shape \[22\]: expected \[23\]"),
        ({"labels": torch.zeros(23)}, r"labels are torch.float32"),
        ({"ids": torch.zeros(23).int()}, r"targets.ids has shape \[23\]: expected \[23, K\]"),
        ({"ids": torch.zeros(22, 5).int()}, r"targets.ids has shape \[22, 5\]: expected \[23, 5\]"),
        ({"logprobs": torch.zeros(23, 4)}, r"targets.logprobs has shape \[23, 4\]: expected \[23, 5\]"),
        ({"tail": torch.zeros(23, 1)}, r"targets.tail has shape \[23, 1\]: expected \[23\]"),
        ({"labels": torch.zeros(23).long().to("meta")}, r"labels on meta, hidden on cpu"),
        ({"tail": torch.zeros(23, device="meta")}, r"tail on meta, hidden on cpu"),
        ({"weight": torch.zeros(97, 13, device="meta")}, r"weight on meta, hidden on cpu"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor], match: str) -> None:
    case = make_case("topk")
    of_targets = {k: v for k, v in change.items() if k in ("ids", "logprobs", "tail")}
    of_case = {k: v for k, v in change.items() if k not in of_targets}
    case = replace(case, targets=replace(case.targets, **of_targets), **of_case)
    with pytest.raises(ValueError, match=match):
        linear_sparse_kd(case.hidden, case.weight, case.labels, case.targets, gamma=1.0, bias=case.bias)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"gradient_skip": 1e-3}])
def test_memory_stays_that_of_a_chunk(options: dict[str, Any]) -> None:
    """No tensor as large as [N, V] is ever allocated: the profiler sees every allocation."""
    n, vocab, d = 600, 5000, 4
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=gen).requires_grad_()
    weight = torch.randn(vocab, d, generator=gen).requires_grad_()
    labels = torch.randint(0, vocab, (n,), generator=gen)
    targets = targets_of([({i: 0.5, i + 1: 0.4}, 0.1) for i in range(n)])
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        linear_sparse_kd(
            hidden, weight, labels, targets, gamma=1.0, temperature=2.0, **options
        ).total.backward()  # type: ignore[no-untyped-call]
    largest = max(event.cpu_memory_usage for event in recorded.events())
    assert 0 < largest < n * vocab * 4 / 10
