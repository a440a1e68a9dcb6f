"""The loss on a GPU: every kernel and path in three dtypes against float64, into poisoned memory, three times alike.

What the interpreter cannot show is what these are for: barriers, races, a GPU's own exp and rounding, and that the
host does not wait. DDK_GPU_TESTS=cpu with TRITON_INTERPRET=1 tries the tests themselves, with -m gpu.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreter import needs_triton
from kernel_cases import GAMMA, Rows, six_rows, truth
from loss_cases import Case, dense, make_case, relative, replaced
from torch import Tensor

from ddk_pipe.pipeline.losses import (
    chosen_implementation,
    chunks,
    first_use,
    labelled_rows,
    measure,
    measure_rows,
    products,
    rows_sparse_kd,
)
from ddk_pipe.pipeline.targets import NO_LABEL

DEVICE = torch.device(os.environ.get("DDK_GPU_TESTS", "cuda"))
IS_CUDA = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative norms. A loss is computed in float32 whatever stores the logits; a gradient is stored in their dtype.
LOSS_BOUND = 1e-5
GRADIENT_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Logits of 16-bit operands are rounded before the loss, by the kernel's path.
PATH_BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32: these are tests of what we wrote."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def poison() -> None:
    """What the allocator hands out next is full of NaN, as far as it reuses what it has."""
    sizes = (2**12, 2**16, 2**20, 2**24)
    blocks = [torch.full((size,), float("nan"), device=DEVICE) for size in sizes for _ in range(4)]
    del blocks


def three_times(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `call` gives, each time into poisoned memory; the same bits every time."""
    found = []
    for _ in range(3):
        poison()
        found.append([x.clone() for x in call()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    return [x.cpu() for x in found[0]]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("vocab", "kept"), [(301, 12), (4992, 200), (5003, 300)])
def test_the_row_kernel(vocab: int, kept: int, temperature: float, dtype: torch.dtype) -> None:
    """Rows of every kind, one ignored and full of NaN, many of them: races want company."""
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    torch.manual_seed(0)
    six = six_rows(vocab, kept)
    copies = 64 if IS_CUDA else 1
    p = many(six, copies)
    logits, labels, t = p.logits.to(dtype).to(DEVICE), p.labels.to(DEVICE), p.targets.to(DEVICE)

    def call() -> list[Tensor]:
        z = torch.full((len(logits), vocab + 16), 7.0, dtype=dtype, device=DEVICE)
        z[:, :vocab] = logits
        ce, kl = sparse_kl(
            z[:, :vocab], labels, t.ids, t.logprobs, t.tail, gamma=GAMMA, temperature=temperature
        )
        assert bool((z[:, vocab:] == 7).all())
        return [ce, kl, z[:, :vocab]]

    ce, kl, gradient = three_times(call)
    want = [x.repeat(copies, *[1] * (x.ndim - 1)) for x in truth(six, dtype, temperature, GAMMA)]
    assert relative(ce, want[0]) <= LOSS_BOUND
    assert relative(kl, want[1]) <= LOSS_BOUND * max(1.0, float(1 / want[1].norm()))
    assert relative(gradient, want[2]) <= GRADIENT_BOUNDS[dtype]
    assert not gradient[p.labels == NO_LABEL].any()


def many(p: Rows, copies: int) -> Rows:
    t = p.targets
    targets = replace(
        t,
        ids=t.ids.repeat(copies, 1),
        logprobs=t.logprobs.repeat(copies, 1),
        tail=t.tail.repeat(copies),
    )
    return Rows(p.logits.repeat(copies, 1), p.labels.repeat(copies), targets)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_kernels_that_store_no_logits(temperature: float, dtype: torch.dtype) -> None:
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import fused_linear_sparse_kl

    if not IS_CUDA and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    case = replaced(big_case(), dtype)
    case = replace(case, bias=torch.zeros_like(case.bias))
    want, gradients = dense(case, gamma=GAMMA, temperature=temperature)
    t = case.targets.to(DEVICE)
    hidden, weight = (x.to(dtype).to(DEVICE) for x in (case.hidden, case.weight))

    def call() -> list[Tensor]:
        return list(
            fused_linear_sparse_kl(
                hidden, weight, case.labels.to(DEVICE), t.ids, t.logprobs, t.tail,
                gamma=GAMMA, temperature=temperature, vocab_chunk=512,
            )
        )  # fmt: skip

    ce, kl, d_hidden, d_weight = three_times(call)
    bound = GRADIENT_BOUNDS[dtype]
    assert relative(ce.sum(), want.ce) <= 2 * LOSS_BOUND
    assert relative(kl.sum(), want.kl) <= 2 * LOSS_BOUND
    assert relative(d_hidden, gradients[0]) <= bound
    assert relative(d_weight, gradients[1]) <= bound


def big_case() -> Case:
    return make_case("topk", n=80 if IS_CUDA else 12, vocab=1200, d=64, k=20, scale=0.3)


PATHS = [
    (implementation, options)
    for implementation, options in itertools.product(
        ("chunked", "triton", "auto"),
        ({}, {"temperature": 2.0}, {"softcap": 3.0}, {"softcap": 3.0, "temperature": 2.0}),
    )
] + [("chunked", {"direction": "reverse"}), ("auto", {"direction": "reverse"})]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("implementation", "options"), PATHS)
def test_every_path(
    implementation: Any, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunks, "MAX_CHUNK_ROWS", 32)
    case = replaced(big_case(), dtype)
    cap = options.get("softcap")
    inputs = [x.double().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    want, want_gradients = dense_capped(case, inputs, cap, options)
    rows = labelled_rows(
        case.labels, case.targets, vocab=1200, gamma=GAMMA, direction=options.get("direction", "forward")
    ).to(DEVICE)

    def call() -> list[Tensor]:
        leaves = [x.to(dtype).to(DEVICE).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        loss = rows_sparse_kd(
            leaves[0], leaves[1], rows, gamma=GAMMA, bias=leaves[2], implementation=implementation, **options
        )
        return [loss.total.detach(), loss.ce, loss.kl, *torch.autograd.grad(loss.total, leaves)]

    found = three_times(call)
    names = ("total", "ce", "kl", "dhidden", "dweight", "dbias")
    for name, mine, true in zip(names, found, [want.total, want.ce, want.kl, *want_gradients], strict=True):
        assert relative(mine, true.detach()) <= PATH_BOUNDS[dtype], name


def dense_capped(
    case: Case, inputs: list[Tensor], cap: float | None, options: dict[str, Any]
) -> tuple[Any, list[Tensor]]:
    """The truth by autograd in float64, the cap outside."""
    from ddk_pipe.pipeline.losses import sparse_kd_reference

    z = torch.nn.functional.linear(*inputs)
    z = z if cap is None else cap * torch.tanh(z / cap)
    others = {name: value for name, value in options.items() if name != "softcap"}
    loss = sparse_kd_reference(z, case.labels, case.targets, gamma=GAMMA, **others)
    return loss, list(torch.autograd.grad(loss.total, inputs))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_first_use_finds_nothing_wrong(temperature: float, dtype: torch.dtype) -> None:
    """What "auto" asks before it takes the kernel; a warning here would be an error."""
    for kept in (first_use.KEPT, 2 * first_use.KEPT):
        assert first_use.complaint(DEVICE, dtype, dtype, temperature, kept) is None
    if IS_CUDA:
        assert chosen_implementation(DEVICE, dtype, temperature=temperature) == "triton"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    """Sums of 16-bit products come out in float32: added to what is there, and read through a transposed view."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 48, generator=generator).to(dtype) for _ in range(2))
    x, y = (products.as_operand(m.to(DEVICE), dtype) for m in (a, b))
    exact = a.double().t() @ b.double()

    def call() -> list[Tensor]:
        out, total = torch.empty(48, 48, device=DEVICE), torch.full((48, 48), 100.0, device=DEVICE)
        return [products.multiply_(out, x.t(), y), products.add_product_(total, x.t(), y)]

    out, total = three_times(call)
    assert relative(out, exact) <= 1e-6
    assert relative(total, 100 + exact) <= 1e-6


def test_softmax_into_its_own_input_is_safe() -> None:
    for vocab in (1000, 4096, 49152, 131072):
        x = torch.randn(64 if IS_CUDA else 2, vocab, device=DEVICE)
        want = torch.softmax(x, 1)
        torch.softmax(x, 1, out=x)
        assert torch.equal(x, want)


@needs_triton
@pytest.mark.skipif(not IS_CUDA, reason="waits are CUDA's")
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"softcap": 3.0}])
@pytest.mark.parametrize("implementation", ["chunked", "auto"])
def test_the_host_never_waits(implementation: Any, options: dict[str, Any]) -> None:
    case = big_case()
    rows = labelled_rows(case.labels, case.targets, vocab=1200, gamma=GAMMA).to(DEVICE)
    leaves = [x.bfloat16().to(DEVICE).requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def call() -> None:
        loss = rows_sparse_kd(
            leaves[0], leaves[1], rows, gamma=GAMMA, bias=leaves[2], implementation=implementation, **options
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
        measure_rows(leaves[0], leaves[1], rows, bias=leaves[2], **options)

    call()  # the first use may wait, and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_measures_are_those_of_the_cpu() -> None:
    case = big_case()
    hidden, weight = case.hidden.float(), case.weight.float()
    want = measure(hidden, weight, case.labels, case.targets, temperature=2.0)
    rows = labelled_rows(case.labels, case.targets, vocab=1200, gamma=1.0).to(DEVICE)
    (found,) = three_times(
        lambda: [measure_rows(hidden.to(DEVICE), weight.to(DEVICE), rows, temperature=2.0)]
    )
    assert relative(found, want) <= 1e-5
