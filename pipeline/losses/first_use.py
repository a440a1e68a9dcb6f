"""A small problem on which the Triton path of the loss is compared with float64, before a device is trusted with it.

Kernel and products are looked at apart: the kernel is given logits, and compared on these very logits; the products
are given operands. So what is bounded is the error of each step, without the rounding of the logits in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.logit_gradient import triton_loss_and_gradient_
from ddk_pipe.pipeline.losses.products import accumulator, add_product_, as_operand, multiply_
from ddk_pipe.pipeline.losses.reference import sparse_kd_reference
from ddk_pipe.pipeline.losses.rows import LabelledRows, labelled_rows
from ddk_pipe.pipeline.losses.terms import NEG_INF, Terms
from ddk_pipe.pipeline.targets import PADDING_ID, SparseTargets

ROWS, VOCAB, WIDTH = (
    16,
    4992,
    64,
)  # several steps of the kernel's loops; a multiple of 16, as vocabularies are
KEPT = 256  # ids of the kernel's narrow launch
GAMMA = 0.7

# Relative norms. What is stored in 16 bits is off by its rounding; a lost barrier or a wrong tail is off by far more.
LOSS_BOUND = 1e-4
GRADIENT_BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PRODUCT_BOUND = 5e-3  # of float32 results, which TF32 may have made


def complaint(
    device: torch.device, operand: torch.dtype, logits: torch.dtype, temperature: float, kept: int
) -> str | None:
    """What is wrong with the kernel on logits of that dtype, or with products of such operands; None if nothing is."""
    try:
        with torch.inference_mode(False), torch.no_grad():  # whatever the loss is called in
            errors = _kernel_errors(device, logits, temperature, kept) | _product_errors(device, operand)
    except Exception as reason:  # noqa: BLE001 - a compiler, a driver, a version: whatever it is, torch does it then
        return " ".join(f"{type(reason).__name__}: {reason}".split())[:300]
    bounds = {"CE": LOSS_BOUND, "KL": LOSS_BOUND, "the gradient": GRADIENT_BOUNDS[logits]}
    over = [
        f"{name} is off by {error:.2g}"
        for name, error in errors.items()
        if not error <= bounds.get(name, PRODUCT_BOUND)  # NaN keeps none
    ]
    return ", ".join(over) or None


def _kernel_errors(
    device: torch.device, dtype: torch.dtype, temperature: float, kept: int
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, VOCAB, generator=generator).mul_(3).to(dtype)
    labels, targets = _targets(kept, generator)
    exact = z.double().requires_grad_()
    with torch.enable_grad():
        want = sparse_kd_reference(exact, labels, targets, gamma=GAMMA, temperature=temperature)
        (gradient,) = torch.autograd.grad(want.total, exact)
    rows: LabelledRows = labelled_rows(labels, targets, vocab=VOCAB, gamma=GAMMA).to(device)
    found = z.to(device)
    terms = Terms(GAMMA, temperature, "forward", by_triton=True)
    ce, kl = triton_loss_and_gradient_(found, rows, terms, True)
    return {
        "CE": _relative(ce.sum(), want.ce.detach()),
        "KL": _relative(kl.sum(), want.kl.detach()),
        "the gradient": _relative(found, gradient),
    }


def _targets(kept: int, generator: torch.Generator) -> tuple[Tensor, SparseTargets]:
    """Labels [ROWS] and ragged targets: with a tail and without, a silent row, labels among the ids and not."""
    order = torch.rand(ROWS, VOCAB, generator=generator).argsort(1)
    ids = order[:, :kept].sort(1).values.int()
    log_weights = torch.randn(ROWS, kept + 1, generator=generator).mul_(2)
    counts = torch.randint(1, kept + 1, (ROWS,), generator=generator)
    counts[0], counts[1] = kept, 0
    padding = torch.arange(kept) >= counts[:, None]
    log_weights[:, :kept].masked_fill_(padding, NEG_INF)
    log_weights[1::2, kept] = NEG_INF
    log_weights = log_weights.log_softmax(1)
    log_weights[1] = NEG_INF  # neither ids nor a tail
    labels = order[:, -1].clone()
    labels[::3] = ids[::3, 0].long()
    ids.masked_fill_(padding, PADDING_ID)
    return labels, SparseTargets(ids, log_weights[:, :kept].contiguous(), log_weights[:, kept].contiguous())


def _product_errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    dz, w = (
        as_operand(torch.randn(*shape, generator=generator).to(device), dtype)
        for shape in ((ROWS, VOCAB), (VOCAB, WIDTH))
    )
    h = w[:ROWS]
    wide = accumulator(dtype)
    d_hidden, d_weight = w.new_empty(ROWS, WIDTH, dtype=wide), w.new_ones(VOCAB, WIDTH, dtype=wide)
    multiply_(d_hidden, dz, w)
    add_product_(d_weight, dz.t(), h)
    exact = [x.cpu().double() for x in (dz, w, h)]
    return {
        "the product of dhidden": _relative(d_hidden, exact[0] @ exact[1]),
        "the product of dweight": _relative(d_weight, 1 + exact[0].t() @ exact[2]),
    }


def _relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|; NaN, which no bound holds, if `found` is not finite."""
    return float((found.cpu().double() - exact).norm() / exact.norm())
