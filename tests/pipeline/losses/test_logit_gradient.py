"""The soft cap of logits, and what the arithmetic on a chunk in place relies on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BOUND, NEG_INF, Case, linear, make_case, relative, replaced
from torch import Tensor
from torch_kernel import torch_kernel

from ddk_pipe.pipeline.losses import SparseKdLoss, chunks, linear_sparse_kd, sparse_kd_reference

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")


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

    monkeypatch.setattr(chunks, "triton_loss_and_gradient_", torch_kernel)
    case = make_case("topk")
    want, want_gradients = capped_dense(case, 1.5, gamma=0.7)
    got, gradients = linear(case, gamma=0.7, softcap=1.5, implementation="triton")
    assert relative(got.total, want.total) <= 1e-12
    assert all(relative(a, b) <= 1e-12 for a, b in zip(gradients, want_gradients, strict=True))
