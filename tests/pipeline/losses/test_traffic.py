"""What the loss asks of a device, counted on a CPU: bytes a logit of each path, and no waits at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dispatch import Watch
from loss_cases import Case, make_case
from torch import Tensor
from torch_kernel import cuda_like_cpu, torch_kernel

from ddk_pipe.pipeline.losses import (
    N_SUMS,
    LabelledRows,
    chunks,
    labelled_rows,
    measure_rows,
    measures,
    rows_sparse_kd,
)
from ddk_pipe.pipeline.losses.terms import Terms

pytestmark = pytest.mark.usefixtures("one_thread")

N, V, D = 16, 4096, 8
CHUNKED: dict[str, float] = {"T = 1": 36, "T = 2": 76, "T = 1, softcap": 96}
CHUNKED_16_BIT: dict[str, float] = {"T = 1": 38, "T = 2": 78, "T = 1, softcap": 98}


def count_the_kernel(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch in the kernel's place, at the kernel's cost: two readings and one writing."""

    def kernel(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        watch.add("sparse_kl", 3 * z.numel() * z.element_size())
        with watch.uncounted():
            return torch_kernel(z, *rest)

    monkeypatch.setattr(chunks, "triton_loss_and_gradient_", kernel)


def problem(dtype: torch.dtype, *, all_labelled: bool = True) -> tuple[Case, list[Tensor], LabelledRows]:
    case = make_case("threshold", n=N, vocab=V, d=D)
    case.labels.clamp_(min=0) if all_labelled else None
    inputs = [x.to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = labelled_rows(case.labels, case.targets, vocab=V, gamma=0.7, dtype=wide)
    return case, inputs, rows


def bytes_a_logit(watch: Watch, inputs: list[Tensor], rows: LabelledRows, **options: Any) -> float:
    # Whatever is at least as large as a chunk's logits; [V, d] is smaller here, [V, d] gradients are not counted.
    with watch:
        loss = rows_sparse_kd(inputs[0], inputs[1], rows, gamma=0.7, **options)
        loss.total.backward()  # type: ignore[no-untyped-call]
    return watch.bytes / (len(rows) * V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHUNKED)
def test_bytes_a_logit_in_torch(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/loss.md says."""
    cuda_like_cpu(monkeypatch)
    _, inputs, rows = problem(dtype)
    watch = Watch(least=N * V)
    options = {"temperature": 2.0 if "T = 2" in name else 1.0, "softcap": 30.0 if "softcap" in name else None}
    found = bytes_a_logit(watch, inputs, rows, implementation="chunked", **options)
    wanted = (CHUNKED if dtype == torch.float32 else CHUNKED_16_BIT)[name]
    assert found == pytest.approx(wanted, abs=0.01), watch.by_operator


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_a_logit_of_the_kernels_path_are_six_times_a_logits(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 in 16 bits: written, read twice and written, read twice."""
    _, inputs, rows = problem(dtype)
    watch = Watch(least=N * V)
    cuda_like_cpu(monkeypatch)
    count_the_kernel(watch, monkeypatch)
    found = bytes_a_logit(watch, inputs, rows, implementation="triton", temperature=temperature)
    assert found == pytest.approx(6 * dtype.itemsize, abs=0.01), watch.by_operator


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"softcap": 3.0}, {"direction": "reverse"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_never_waits(
    dtype: torch.dtype, options: dict[str, Any], implementation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "triton" and "direction" in options:
        return
    cuda_like_cpu(monkeypatch)
    monkeypatch.setattr(chunks, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunks, "MAX_CHUNK_ROWS", 5)
    _, inputs, rows = problem(dtype, all_labelled=False)
    assert len(rows) < N

    with Watch() as watch:
        loss = rows_sparse_kd(
            inputs[0], inputs[1], rows, gamma=0.7, bias=inputs[2], implementation=implementation, **options
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
    assert not watch.waits
    # Tensors without numbers refuse to be waited for, whether the counter knows the way or not.
    terms = Terms(
        gamma=0.7,
        temperature=options.get("temperature", 1.0),
        direction=options.get("direction", "forward"),
        by_triton=implementation == "triton",
        softcap=options.get("softcap"),
    )
    hidden, weight, bias = (x.detach().to("meta") for x in inputs)
    found = chunks.sums_and_gradients(
        hidden, weight, bias, rows.to("meta"), terms, dtype, wanted=(True, True, True)
    )
    assert [x is not None for x in found[2]] == [True] * 3


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "softcap": 3.0}])
def test_measures_never_wait(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "CHUNK_BYTES", 4 * V * 5)
    _, inputs, rows = problem(torch.float32, all_labelled=False)
    with Watch() as watch:
        measure_rows(inputs[0], inputs[1], rows, bias=inputs[2], **options)
    assert not watch.waits
    hidden, weight, bias = (x.detach().to("meta") for x in inputs)
    assert measure_rows(hidden, weight, rows.to("meta"), bias=bias, **options).shape == (N_SUMS,)


def test_checks_of_rows_wait_and_are_seen_to() -> None:
    """The counter counts: labelled_rows looks at numbers."""
    case, *_ = problem(torch.float32)
    with Watch() as watch:
        labelled_rows(case.labels, case.targets, vocab=V, gamma=0.7)
    assert {"nonzero", "tolist"} <= set(watch.waits)
    with Watch() as watch:
        case.labels[case.labels > 0]
        case.labels.sum().item()
    assert watch.waits == {"index": 1, "_local_scalar_dense": 1}
