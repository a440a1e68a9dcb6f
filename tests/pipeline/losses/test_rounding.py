"""The kernel's path rounds no more than cross-entropy on full logits of the same 16-bit dtype does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dispatch import Watch
from loss_cases import relative
from torch import Tensor
from torch_kernel import cuda_like_cpu

from ddk_pipe.pipeline.losses import SparseKdLoss, linear_sparse_kd, sparse_kd_reference
from ddk_pipe.pipeline.targets import SparseTargets, top_with_tail

pytestmark = pytest.mark.usefixtures("one_thread")

N, V, D, K = 96, 1024, 64, 16


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, SparseTargets]:
    """hidden [N, D] and weight [V, D] that `dtype` holds, labels drawn of a teacher, the teacher's top K."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator).mul_(3 / D**0.5)
    teacher = ((hidden + 0.15 * torch.randn(N, D, generator=generator)) @ weight.t()).log_softmax(1)
    labels = torch.multinomial(teacher.exp(), 1, generator=generator)[:, 0]
    return hidden.to(dtype), weight.to(dtype), labels, top_with_tail(teacher.exp(), K, floor=0.0)


def on_full_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets, gamma: float
) -> Tensor:
    """What a trainer writes: logits in the layer's dtype, the loss in float32."""
    logits = hidden @ weight.t()
    ce = F.cross_entropy(logits.float(), labels, reduction="sum")
    return ce + gamma * sparse_kd_reference(logits, labels, targets, gamma=0.0).kl if gamma else ce


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_at_most_those_of_full_logits(
    dtype: torch.dtype, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_like_cpu(monkeypatch)
    hidden, weight, labels, targets = problem(dtype)

    def gradients(loss: Tensor | SparseKdLoss, inputs: list[Tensor]) -> list[Tensor]:
        total = loss if isinstance(loss, Tensor) else loss.total
        return [total.detach(), *torch.autograd.grad(total, inputs)]

    def leaves(kind: torch.dtype) -> list[Tensor]:
        return [x.detach().to(kind).requires_grad_() for x in (hidden, weight)]

    exact = leaves(torch.float64)
    truth = gradients(sparse_kd_reference(exact[0] @ exact[1].t(), labels, targets, gamma=gamma), exact)
    mine, theirs = leaves(dtype), leaves(dtype)
    with Watch():
        ours = gradients(
            linear_sparse_kd(mine[0], mine[1], labels, targets, gamma=gamma, implementation="triton"),
            mine,
        )
    full = gradients(on_full_logits(theirs[0], theirs[1], labels, targets, gamma), theirs)
    for name, own, other, true in zip(("total", "dhidden", "dweight"), ours, full, truth, strict=True):
        assert relative(own, true) <= 1.05 * relative(other, true), name
