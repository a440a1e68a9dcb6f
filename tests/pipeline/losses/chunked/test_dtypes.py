"""The chunked loss on any layout and dtype of its inputs."""

from __future__ import annotations

import pytest
import torch
from loss_cases import Case, assert_equals_reference, dense, linear, make_case, relative, replaced

from ddk_pipe.pipeline.losses import chunks, linear_sparse_kd, products, sparse_kd_reference
from ddk_pipe.pipeline.targets import SparseTargets

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")


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
    monkeypatch.setattr(products, "WIDENING_DEVICES", frozenset({"cpu"} if widen else ()))
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
    monkeypatch.setattr(chunks, "MAX_CHUNK_ROWS", 1)
    for widening in (frozenset({"cpu"}), frozenset()):
        monkeypatch.setattr(products, "WIDENING_DEVICES", widening)
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
