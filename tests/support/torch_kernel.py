"""The Triton row kernel's arithmetic in torch, to stand in its place on a CPU: float32 from logits of any dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddk_pipe.pipeline.losses import chunks, first_use, products
from ddk_pipe.pipeline.losses.logit_gradient import loss_and_gradient_
from ddk_pipe.pipeline.losses.rows import LabelledRows
from ddk_pipe.pipeline.losses.terms import Terms


def torch_kernel(z: Tensor, rows: LabelledRows, terms: Terms, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """As `triton_loss_and_gradient_`; float64 logits stay float64."""
    wide = z.double() if z.dtype == torch.float64 else z.float()
    flat = torch.cat([wide.flatten(), wide.new_zeros(1)])
    softened = None if terms.temperature == 1 else torch.empty_like(wide)
    ce, kl = loss_and_gradient_(flat, rows, terms, softened, want_gradient)
    if want_gradient:
        z.copy_(flat[:-1].view_as(z))
    return ce, kl


def cuda_like_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU does as CUDA does: 16-bit products with float32 results (inside a `dispatch.Watch`), and a row kernel."""
    monkeypatch.setattr(products, "WIDENING_DEVICES", frozenset())
    monkeypatch.setattr(products, "WIDE_RESULT_DEVICES", frozenset({"cpu"}))
    for module in (chunks, first_use):
        monkeypatch.setattr(module, "triton_loss_and_gradient_", torch_kernel)
