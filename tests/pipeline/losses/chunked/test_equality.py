"""The chunked loss equals the reference, whatever the chunks, and never holds [N, V]."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_cases import (
    BOUND,
    BUCKETS,
    NEG_INF,
    SCHEMES,
    Case,
    assert_equals_reference,
    dense,
    linear,
    make_case,
    one_hot_loss,
    relative,
    targets_of,
)
from torch import Tensor

from ddk_pipe.pipeline.losses import LabelledRows, chunks, linear_sparse_kd, sparse_kd_reference
from ddk_pipe.pipeline.losses.logit_gradient import loss_and_gradient_
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")

LINEAR_SIZES = [(23, 97, 13, 5), (7, 33, 5, 1), (1, 2, 1, 1), (11, 300, 17, 40)]


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
    inner = loss_and_gradient_

    def spy(flat: Tensor, rows: LabelledRows, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(rows))
        return inner(flat, rows, *rest)

    monkeypatch.setattr(chunks, "loss_and_gradient_", spy)
    monkeypatch.setattr(chunks, "MAX_CHUNK_ROWS", 4096)
    monkeypatch.setattr(chunks, "CPU_LOGIT_BYTES", rows * 97 * 8)  # float64
    case = make_case("pps")
    assert_equals_reference(case, gamma=0.7, temperature=temperature)
    labelled = int((case.labels != NO_LABEL).sum())
    assert sum(seen) == labelled
    assert max(seen) <= rows
    assert len(seen) == math.ceil(labelled / rows)  # else the memory bound is not what sets them


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
