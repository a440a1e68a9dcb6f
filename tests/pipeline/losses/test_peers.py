"""Defects found in other packages' losses (facts/peers.md, section 5), each as a test of ours; and eager PyTorch.

Numbers in the names are rows of that table. Everything is float64 unless it says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddk_pipe.pipeline.losses import SparseKdLoss, linear_sparse_kd, sparse_kd_reference
from ddk_pipe.pipeline.targets import PADDING_ID, SparseTargets

N, V, D, K = 12, 101, 7, 6
NEG_INF = float("-inf")


def problem(n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, D], weight [V, D], labels [n], dense teacher log-probabilities [n, V]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, V, (n,), generator=generator)
    teacher = (2 * torch.randn(n, V, dtype=torch.float64, generator=generator)).log_softmax(1)
    return hidden, weight, labels, teacher


def top(teacher: Tensor, k: int = K) -> SparseTargets:
    """The k largest and a bucket."""
    ids = teacher.topk(k).indices.sort(1).values
    tail = teacher.scatter(1, ids, NEG_INF).logsumexp(1)
    return SparseTargets(ids=ids.int(), logprobs=teacher.gather(1, ids).float(), tail=tail.float())


def loss_and_gradients(
    targets: SparseTargets, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[SparseKdLoss, list[Tensor]]:
    hidden, weight, labels, _ = problem(len(targets.ids))
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    loss = linear_sparse_kd(leaves[0], leaves[1], labels, targets, **{"gamma": 1.0, **options})
    return loss, list(torch.autograd.grad(loss.total, leaves))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_2_temperature_squared_is_in_the_gradient_as_in_the_loss(temperature: float) -> None:
    """The gradient against a difference quotient of the reported loss itself: no other formula can hide a
    factor."""
    hidden, weight, labels, teacher = problem()
    targets, step = top(teacher), 1e-6
    direction = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"gamma": 1.0, "temperature": temperature}
    _, (d_hidden, _) = loss_and_gradients(targets, temperature=temperature)
    ends = [
        linear_sparse_kd(hidden + sign * step * direction, weight, labels, targets, **options).total
        for sign in (1, -1)
    ]
    quotient = float(ends[0] - ends[1]) / (2 * step)
    assert float((d_hidden * direction).sum()) == pytest.approx(quotient, rel=1e-6)


@pytest.mark.parametrize("extra", [0, 1, 50])
def test_3_the_loss_is_a_sum_over_positions_whatever_k_is(extra: int) -> None:
    targets = top(problem()[3])
    padded = SparseTargets(
        ids=F.pad(targets.ids, (0, extra), value=PADDING_ID),
        logprobs=F.pad(targets.logprobs, (0, extra), value=NEG_INF),
        tail=targets.tail,
    )
    loss, gradients = loss_and_gradients(padded)
    single = [
        sparse_kd_reference(
            (problem()[0] @ problem()[1].t())[i : i + 1],
            problem()[2][i : i + 1],
            targets.rows(slice(i, i + 1)),
            gamma=1.0,
        )
        for i in range(N)
    ]
    assert loss.positions == N
    for part in ("total", "ce", "kl"):
        assert float(getattr(loss, part).detach()) == pytest.approx(
            sum(float(getattr(one, part)) for one in single)
        )
    assert all(
        relative(a, b) <= 1e-12 for a, b in zip(gradients, loss_and_gradients(targets)[1], strict=True)
    )


def test_4_the_student_is_not_renormalised_over_the_kept_ids() -> None:
    """Renormalised, KL is smaller than it is, and no logit off the ids moves. Here the bucket bounds KL from
    below."""
    hidden, weight, _, teacher = problem()
    targets = top(teacher)
    log_q = (hidden @ weight.t()).log_softmax(1)
    exact = float((teacher.exp() * (teacher - log_q)).sum())
    ids = targets.ids.long()
    p, q = (x.gather(1, ids).log_softmax(1) for x in (teacher, log_q))
    renormalised = float((p.exp() * (p - q)).sum())
    found = float(loss_and_gradients(targets)[0].kl)
    assert renormalised < 0.95 * found
    assert found <= exact + 1e-6
    whole = SparseTargets(
        ids=torch.arange(V, dtype=torch.int32).repeat(N, 1),
        logprobs=teacher.float(),
        tail=torch.full((N,), NEG_INF),
    )
    assert float(loss_and_gradients(whole)[0].kl) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("scheme", ["bucket", "no tail"])
def test_4_logits_off_the_kept_ids_have_a_gradient(scheme: str) -> None:
    _, _, labels, teacher = problem(D)
    targets = top(teacher)
    if scheme == "no tail":
        targets = replace(targets, logprobs=targets.logprobs.log_softmax(1), tail=torch.full((D,), NEG_INF))
    hidden = torch.eye(D, dtype=torch.float64)  # dweight is then the gradient of the logits, turned
    weight = problem()[1].requires_grad_()
    totals = [
        linear_sparse_kd(hidden, weight, labels, given, gamma=gamma).total
        for given, gamma in ((targets, 1.0), (None, 0.0))
    ]
    of_kl = (torch.autograd.grad(totals[0], weight)[0] - torch.autograd.grad(totals[1], weight)[0]).t()
    off = torch.ones(D, V, dtype=torch.bool).scatter(1, targets.ids.long(), False)
    assert float(of_kl[off].abs().min()) > 0
    assert float(of_kl.sum(1).abs().max()) <= 1e-6  # softmax: what one logit gains others lose


@pytest.mark.parametrize("nats", [1.0, 10.0, 20.0, 100.0])
def test_10_the_tail_is_not_one_minus_a_sum(nats: float) -> None:
    """The student's tail lies `nats` under its ids: in float32, 1 - sum is 0 from 17 nats on, and its log is
    not."""
    hidden, weight, labels, teacher = problem()
    ids = torch.arange(K, dtype=torch.int32).repeat(N, 1)
    targets = replace(top(teacher), ids=ids)
    hidden = torch.cat([hidden, torch.ones(N, 1, dtype=torch.float64)], 1)
    weight = torch.cat([weight, torch.zeros(V, 1, dtype=torch.float64)], 1)
    weight[:K, -1] = nats
    single, double = (linear_sparse_kd(hidden.to(t), weight.to(t), labels, targets, gamma=1.0)
                      for t in (torch.float32, torch.float64))  # fmt: skip
    assert float(single.kl) == pytest.approx(float(double.kl), rel=2e-6)


def test_11_the_last_id_of_the_vocabulary_is_an_id_and_padding_is_none() -> None:
    teacher = problem()[3]
    alone = SparseTargets(
        ids=torch.full((N, 1), V - 1, dtype=torch.int32),
        logprobs=teacher[:, -1:].float(),
        tail=torch.log1p(-teacher[:, -1].exp()).float(),
    )
    padded = SparseTargets(
        ids=torch.cat([torch.full((N, 1), PADDING_ID, dtype=torch.int32), alone.ids], 1),
        logprobs=F.pad(alone.logprobs, (1, 0), value=NEG_INF),
        tail=alone.tail,
    )
    want = sparse_kd_reference(problem()[0] @ problem()[1].t(), problem()[2], alone, gamma=1.0)
    for targets in (alone, padded):
        assert float(loss_and_gradients(targets)[0].kl) == pytest.approx(float(want.kl), rel=1e-12)


def test_15_a_truncated_kl_with_its_bucket_is_not_negative_and_is_not_clamped() -> None:
    """A student that is the teacher: the truncated sum alone is negative, with the bucket it is 0."""
    hidden, weight, labels, _ = problem()
    log_q = (hidden @ weight.t()).log_softmax(1)
    assert abs(float(linear_sparse_kd(hidden, weight, labels, top(log_q), gamma=1.0).kl)) <= 1e-5
    louder = (1.5 * hidden @ weight.t()).log_softmax(1)
    kept = louder.topk(K).indices
    truncated = (log_q.gather(1, kept).exp() * (log_q - louder).gather(1, kept)).sum()
    assert float(truncated) < 0
    assert float(linear_sparse_kd(1.5 * hidden, weight, labels, top(log_q), gamma=1.0).kl) > 0


@pytest.mark.parametrize("padding", ["a slot", "a row"])
def test_16_padding_of_minus_infinity_gives_no_nan(padding: str) -> None:
    targets = top(problem()[3])
    ids, logprobs, tail = targets.ids.clone(), targets.logprobs.clone(), targets.tail.clone()
    row = slice(None) if padding == "a slot" else slice(0, 3)
    columns = slice(0, 1) if padding == "a slot" else slice(None)
    ids[row, columns], logprobs[row, columns] = PADDING_ID, NEG_INF
    if padding == "a row":
        tail[row] = NEG_INF
    loss, gradients = loss_and_gradients(SparseTargets(ids=ids, logprobs=logprobs, tail=tail))
    assert all(math.isfinite(float(x.detach())) for x in (loss.total, loss.ce, loss.kl))
    assert all(bool(x.isfinite().all()) for x in gradients)


# ---------------------------------------------------------------- eager PyTorch


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> Tensor:
    """CE + KL with a bucket, as one writes it, in the operands' dtype; the tail by a masked log-sum-exp."""
    log_q = F.log_softmax(hidden @ weight.t(), 1)
    ids = targets.ids.long()
    log_w, log_tail = targets.logprobs.to(log_q.dtype), targets.tail.to(log_q.dtype)
    rest = log_q.scatter(1, ids, NEG_INF).logsumexp(1)
    kl = (log_w.exp() * (log_w - log_q.gather(1, ids))).sum() + (log_tail.exp() * (log_tail - rest)).sum()
    return kl - log_q.gather(1, labels[:, None]).sum()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
def test_no_worse_than_eager_pytorch_in_the_same_dtype(dtype: torch.dtype, bound: float) -> None:
    """Errors against float64 on the operands as dtype rounds them; slack: a hundredth of the bound."""
    hidden, weight, labels, teacher = problem()
    targets = top(teacher)

    def errors_of(total: Tensor, leaves: list[Tensor]) -> list[float]:
        exact = [x.detach().double().requires_grad_() for x in leaves]
        truth = sparse_kd_reference(exact[0] @ exact[1].t(), labels, targets, gamma=1.0).total
        pairs = zip(torch.autograd.grad(total, leaves), torch.autograd.grad(truth, exact), strict=True)
        return [relative(total.detach(), truth.detach()), *(relative(a, b) for a, b in pairs)]

    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    ours = errors_of(linear_sparse_kd(leaves[0], leaves[1], labels, targets, gamma=1.0).total, leaves)
    theirs = errors_of(eager(leaves[0], leaves[1], labels, targets), leaves)
    assert max(ours) <= bound
    assert all(a <= b + 0.01 * bound for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.slow
def test_more_logits_than_int32_can_count() -> None:
    """N V > 2^31: as many times the loss and gradient of one position as there are positions. Some 20 s of
    CPU."""
    n, vocab = 16640, 131072
    assert n * vocab > 2**31
    hidden = torch.ones(n, 1).requires_grad_()
    weight = torch.linspace(-1, 1, vocab)[:, None].clone().requires_grad_()
    targets = SparseTargets(
        ids=torch.tensor([[7, vocab - 1]], dtype=torch.int32).expand(n, -1),
        logprobs=torch.tensor([[0.5, 0.3]]).log().expand(n, -1),
        tail=torch.tensor([0.2]).log().expand(n),
    )
    labels = torch.full((n,), vocab - 1)
    loss = linear_sparse_kd(hidden, weight, labels, targets, gamma=1.0)
    gradients = torch.autograd.grad(loss.total, (hidden, weight))
    one = [hidden[:1].detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    want = sparse_kd_reference(one[0] @ one[1].t(), labels[:1], targets.rows(slice(0, 1)), gamma=1.0)
    single = torch.autograd.grad(want.total, one)
    assert float(loss.total.detach()) == pytest.approx(n * float(want.total.detach()), rel=2e-6)
    # Sums in float32 of V products, and of N equal ones, which round alike: up to N eps / 2 = 1e-3.
    assert relative(gradients[0], single[0].expand(n, 1)) <= 1e-3
    assert relative(gradients[1], n * single[1]) <= 1e-3
