"""What "auto" takes, and that a kernel that comes out wrong where it is first used is not used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dispatch import Watch
from loss_cases import BOUND, dense, linear, make_case, relative, replaced
from torch import Tensor
from torch_kernel import cuda_like_cpu, torch_kernel

from ddk_pipe.pipeline.losses import choice, chosen_implementation, chunks, first_use, linear_sparse_kd

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "TRITON_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(choice, "_triton_is_installed", lambda: True)
    choice._is_right.cache_clear()
    yield
    choice._is_right.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The kernel is right; the dtypes of the logits that losses gave it."""
    cuda_like_cpu(monkeypatch)
    seen: list[torch.dtype] = []

    def kernel(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(z.dtype)
        return torch_kernel(z, *rest)

    monkeypatch.setattr(chunks, "triton_loss_and_gradient_", kernel)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_kernel_that_is_right_is_taken(
    dtype: torch.dtype, temperature: float, calls: list[torch.dtype]
) -> None:
    case = replaced(make_case("topk", scale=0.5), dtype)
    want, _ = dense(case, gamma=0.7, temperature=temperature)
    with Watch():
        assert chosen_implementation(CPU, dtype, temperature=temperature, kept=5) == "triton"
        got, _ = linear(case, dtype, gamma=0.7, temperature=temperature)
    assert set(calls) == {dtype}
    assert relative(got.total, want.total) <= max(BOUND[torch.float32], torch.finfo(dtype).eps)


def test_a_first_use_without_gradients_is_as_good(calls: list[torch.dtype]) -> None:
    with torch.inference_mode(), Watch():
        linear_sparse_kd(*(torch.ones(2, 3), torch.ones(4, 3), torch.ones(2).long()), None, gamma=0.0)
    assert calls


def test_under_a_softcap_the_kernel_gets_float32(calls: list[torch.dtype]) -> None:
    with Watch():
        linear(make_case("topk"), torch.bfloat16, gamma=0.7, softcap=3.0)
    assert set(calls) == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {"direction": "reverse"}),
        (torch.float32, {"kept": 4097}),
    ],
)
def test_what_the_kernel_does_not_do_is_not_tried(
    dtype: torch.dtype, options: Any, calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(*_: Any) -> str:
        raise AssertionError

    monkeypatch.setattr(first_use, "complaint", tried)
    assert chosen_implementation(CPU, dtype, **options) == "chunked"
    assert chosen_implementation(torch.device("meta"), torch.float32) == "chunked"


def test_without_triton_the_chunked_loss_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_triton_is_installed", lambda: False)
    assert chosen_implementation(CPU, torch.float32) == "chunked"


def off_in_some_rows(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    ce, kl = torch_kernel(z, *rest)
    z[::3] *= 1.05
    return ce, kl


def not_a_number(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    ce, kl = torch_kernel(z, *rest)
    kl[0] = float("nan")
    return ce, kl


def does_not_compile(*_: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("PTX\nwas rejected")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (off_in_some_rows, "gradient is off by 0.03"),
        (not_a_number, "KL is off by nan"),
        (does_not_compile, "RuntimeError: PTX was rejected"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_taken_and_said_once(
    kernel: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (chunks, first_use):
        monkeypatch.setattr(module, "triton_loss_and_gradient_", kernel)
    case = make_case("topk")
    with pytest.warns(RuntimeWarning, match=rf"not used on cpu with torch.float32 operands: .*{said}"):
        got, gradients = linear(case, torch.float32, gamma=0.7)
    want, want_gradients = dense(replaced(case, torch.float32), gamma=0.7)
    assert relative(got.total, want.total) <= BOUND[torch.float32]
    for mine, true in zip(gradients, want_gradients, strict=True):
        assert relative(mine, true) <= BOUND[torch.float32]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(case, torch.float32, gamma=0.7)
        assert chosen_implementation(CPU, torch.float32) == "chunked"
