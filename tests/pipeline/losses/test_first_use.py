"""The small problem before a device is trusted: what is right passes in every dtype, what is wrong anywhere does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dispatch import Watch
from torch import Tensor
from torch_kernel import cuda_like_cpu, torch_kernel

from ddk_pipe.pipeline.losses import first_use
from ddk_pipe.pipeline.losses.rows import LabelledRows

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_like_cpu(monkeypatch)


def complaint(dtype: torch.dtype, temperature: float = 1.0, kept: int = first_use.KEPT) -> str | None:
    with Watch():
        return first_use.complaint(CPU, dtype, dtype, temperature, kept)


@pytest.mark.parametrize("kept", [first_use.KEPT, 2 * first_use.KEPT])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_right_passes(dtype: torch.dtype, temperature: float, kept: int) -> None:
    assert complaint(dtype, temperature, kept) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lost", ["the last step of the row", "an id", "the label", "a row"])
def test_a_gradient_that_is_lost_is_seen(
    lost: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(z: Tensor, rows: LabelledRows, *rest: Any) -> tuple[Tensor, Tensor]:
        before = z.clone()
        losses = torch_kernel(z, rows, *rest)
        where: tuple[Any, Any] = {
            "the last step of the row": (slice(None), slice(-64, None)),
            "an id": (5, int(rows.ids[5, 0])),
            "the label": (slice(0, 1), int(rows.labels[0])),
            "a row": (7, slice(None)),
        }[lost]
        z[where] = before[where]
        return losses

    monkeypatch.setattr(first_use, "triton_loss_and_gradient_", kernel)
    assert "gradient is off" in (complaint(dtype) or "")


def test_a_weight_gradient_that_is_not_added_up_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        first_use, "add_product_", lambda out, a, b: out.copy_(torch.mm(a.float(), b.float()))
    )
    assert "product of dweight is off" in (complaint(torch.bfloat16) or "")


def test_the_problem_has_rows_of_every_kind() -> None:
    labels, targets = first_use._targets(first_use.KEPT, torch.Generator().manual_seed(0))
    targets.validate(first_use.VOCAB)
    among = (targets.ids == labels[:, None]).any(1)
    assert bool(among.any()) and not bool(among.all())
    assert bool((targets.tail > float("-inf")).any()) and bool((targets.tail == float("-inf")).any())
    counts = (targets.ids >= 0).sum(1)
    assert (int(counts.min()), int(counts.max())) == (0, first_use.KEPT)
