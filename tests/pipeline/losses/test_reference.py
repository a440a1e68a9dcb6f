"""The reference against a separate dense computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import BUCKETS, SCHEMES, logit_gradient, make_case, one_hot_loss, relative
from torch import Tensor

from ddk_pipe.pipeline.losses import sparse_kd_reference
from ddk_pipe.pipeline.targets import NO_LABEL

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(
    ("scheme", "direction"),
    [(s, "forward") for s in SCHEMES] + [(s, "reverse") for s in BUCKETS],
)
def test_the_reference_equals_plain_loops(scheme: str, direction: Any, temperature: float) -> None:
    case = make_case(scheme)
    z = case.logits.clone().requires_grad_()
    ce, kl = one_hot_loss(z, case, 0.7, temperature, direction)
    want = ce + 0.7 * temperature**2 * kl
    (want_gradient,) = torch.autograd.grad(want, z)
    got, gradient = logit_gradient(case, gamma=0.7, temperature=temperature, direction=direction)
    assert relative(got.ce, ce) <= 1e-12
    assert relative(got.kl, kl) <= 1e-12
    assert relative(got.total, want) <= 1e-12
    assert relative(gradient, want_gradient) <= 1e-12
    assert got.positions == int((case.labels != NO_LABEL).sum())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck_of_the_reference(direction: Any) -> None:
    case = make_case("threshold", n=4, vocab=11, d=3)

    def total(z: Tensor) -> Tensor:
        return sparse_kd_reference(
            z, case.labels, case.targets, gamma=0.7, temperature=2.0, direction=direction
        ).total

    assert torch.autograd.gradcheck(total, case.logits.clone().requires_grad_())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradient_is_the_equation_of_the_design(temperature: float) -> None:
    """q_j - w_j on the ids, q_j (1 - w_tail / (1 - Q)) off them; T^2 scales it as it scales the loss."""
    case = make_case("topk", n=6)
    _, zero = logit_gradient(case, gamma=0.0, temperature=temperature)
    _, both = logit_gradient(case, gamma=1.0, temperature=temperature)
    live = case.labels != NO_LABEL
    s = (case.logits / temperature).softmax(1)[live]
    ids = case.targets.ids[live].long()
    w, w_tail = case.targets.logprobs[live].double().exp(), case.targets.tail[live].double().exp()
    mass = w.sum(1) + w_tail
    kept_mass = s.gather(1, ids).sum(1)
    want = s * (mass - w_tail / (1 - kept_mass))[:, None]
    want.scatter_(1, ids, mass[:, None] * s.gather(1, ids) - w)
    assert relative((both - zero)[live], temperature**2 * want / temperature) <= 1e-10
