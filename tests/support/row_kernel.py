"""What the cases of the row kernel share: how it is called, and compared with the float64 truth.

The truth is `ddk_pipe.pipeline.losses.chunked.sparse_kd_reference` on the very logits that the kernel was given (after
rounding to their dtype), row by row. Errors are relative norms over the batch. kernel_cases.py says how this is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from kernel_cases import GAMMA, Findings, Rows, poisoned_outputs, relative, truth, wrong
from torch import Tensor

LOSS_BOUND = 1e-6  # given the same rounded logits, in every dtype
# The rounding of the store; the interpreter cuts bfloat16 off where a GPU rounds.
GRADIENT_BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def short_steps() -> Iterator[None]:
    """128 float32 logits a step in place of thousands, so that small rows take several steps."""
    from ddk_pipe.triton_kernels import sparse_kl as module

    shipped = module.LAUNCHES
    module.LAUNCHES = ((module.Launch(kept=512, step_bytes=512, warps=4),),)
    try:
        yield
    finally:
        module.LAUNCHES = shipped


def kernel(
    p: Rows,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    gamma: float = GAMMA,
    gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE, KL, what became of the logits, and three columns right of them that nobody may touch."""
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl

    vocab = p.logits.shape[1]
    buffer = torch.full((len(p.logits), vocab + 3), 7.0, dtype=dtype)
    buffer[:, :vocab] = p.logits.to(dtype)
    logits, margin = buffer[:, :vocab], buffer[:, vocab:]
    t = p.targets
    with poisoned_outputs():
        ce, kl = sparse_kl(
            logits,
            p.labels,
            t.ids,
            t.logprobs,
            t.tail,
            gamma=gamma,
            temperature=temperature,
            gradient=gradient,
        )
    return ce, kl, logits, margin


def compare(
    p: Rows, dtype: torch.dtype = torch.float32, temperature: float = 1.0, gamma: float = GAMMA
) -> Findings:
    """The kernel against the truth, and all that must hold for any input."""
    ce, kl, gradient, margin = kernel(p, dtype, temperature, gamma)
    want_ce, want_kl, want_gradient = truth(p, dtype, temperature, gamma)
    ignored = ~p.labelled
    idle = torch.cat([ce[ignored], kl[ignored], gradient[ignored].flatten()])
    return [
        ("ce", relative(ce, want_ce), LOSS_BOUND),
        ("kl", relative(kl, want_kl, least=1.0), LOSS_BOUND),
        ("gradient", relative(gradient, want_gradient), GRADIENT_BOUNDS[dtype]),
        ("columns right of the logits", wrong(torch.equal(margin, torch.full_like(margin, 7.0))), 0.0),
        ("ignored rows give zeros", wrong(bool((idle == 0).all())), 0.0),
    ]
