"""Which gradients the chunked loss forms, and what a backward pass does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import Case, dense, ignored, linear, logit_gradient, make_case, relative
from torch import Tensor

from ddk_pipe.pipeline.losses import chunks, linear_sparse_kd
from ddk_pipe.pipeline.losses.logit_gradient import loss_and_gradient_
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")


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
    inner = loss_and_gradient_

    def spy(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        wanted.append(rest[-1])
        return inner(z, *rest)

    monkeypatch.setattr(chunks, "loss_and_gradient_", spy)
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
