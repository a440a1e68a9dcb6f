"""The chunked loss at named edges: ids, padding, tails and logits far from the usual."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import poisoned_outputs
from loss_cases import (
    NEG_INF,
    SCHEMES,
    assert_equals_reference,
    dense,
    ignored,
    linear,
    make_case,
    one_hot_loss,
    relative,
    targets_of,
)

from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")


def test_one_kept_id() -> None:
    for scheme in SCHEMES:
        assert_equals_reference(make_case(scheme, k=1), gamma=0.7, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ids_that_cover_the_vocabulary_have_no_tail(temperature: float, dtype: torch.dtype) -> None:
    case = make_case("topk", vocab=17, k=17)
    case = replace(case, targets=replace(case.targets, tail=torch.full((23,), NEG_INF)))
    assert_equals_reference(case, dtype, gamma=0.7, temperature=temperature)
    # Full coverage is dense KD, which torch states in one call.
    live = case.labels != NO_LABEL
    log_s = (case.logits / temperature).log_softmax(1)[live]
    teacher = case.targets.logprobs[live].double()
    want = F.kl_div(log_s, teacher, log_target=True, reduction="sum")
    got, _ = linear(case, gamma=0.7, temperature=temperature)
    assert relative(got.kl, want) <= 1e-12


def test_full_coverage_with_a_tail_is_refused_forward_and_finite_reversed() -> None:
    case = make_case("topk", n=3, vocab=7, k=7)
    case = replace(case, targets=replace(case.targets, tail=torch.full((3,), math.log(1e-7))))
    with pytest.raises(ValueError, match=r"position 0 has ids for all 7 tokens and yet a tail"):
        linear(case, gamma=1.0)
    assert_equals_reference(case, gamma=1.0, direction="reverse")


def test_label_inside_and_outside_the_ids() -> None:
    case = make_case("topk", n=8)
    inside = replace(case, labels=case.targets.ids[:, 2].long())
    free = [min(set(range(97)) - set(row)) for row in case.targets.ids.tolist()]
    for labels in (inside.labels, torch.tensor(free)):
        assert_equals_reference(replace(case, labels=labels), gamma=0.7)


def test_ids_in_any_order_mean_the_same() -> None:
    case = make_case("topk")
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    shuffled = SparseTargets(case.targets.ids[:, order], case.targets.logprobs[:, order], case.targets.tail)
    want, want_gradients = linear(case, gamma=0.7)
    got, gradients = linear(replace(case, targets=shuffled), gamma=0.7)
    assert relative(got.total, want.total) <= 1e-14
    assert all(relative(a, b) <= 1e-13 for a, b in zip(gradients, want_gradients, strict=True))


@pytest.mark.parametrize("where", ["last", "first", "between", "everywhere"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_never_stands_for_token_0(where: str, temperature: float) -> None:
    """Padding read or written through id 0 left token 0 out of the softmax: CE 5.591 for 5.597."""
    case = make_case("topk", n=4, vocab=7, k=2)
    case = replace(case, weight=case.weight.clone())
    case.weight[0] *= 3  # make token 0 count
    want = targets_of([({0: 0.5, 3: 0.3}, 0.2), ({3: 0.8}, 0.2), ({}, 0.0), ({}, 1.0)])
    slots = {
        "last": [0, 1, -1, -1],
        "first": [-1, -1, 0, 1],
        "between": [0, -1, 1, -1],
        "everywhere": [-1, 0, -1, 1],
    }[where]
    ids, log_weights = torch.full((4, 4), -1).int(), torch.full((4, 4), NEG_INF)
    for slot, source in enumerate(slots):
        if source >= 0:
            ids[:, slot] = want.ids[:, source]
            log_weights[:, slot] = want.logprobs[:, source]
    padded = replace(case, targets=SparseTargets(ids, log_weights, want.tail))
    case = replace(case, targets=want)
    ce, kl = one_hot_loss(case.logits, case, 1.0, temperature, "forward")
    for got, gradients in (linear(padded, gamma=1.0, temperature=temperature),
                           dense(padded, gamma=1.0, temperature=temperature)):  # fmt: skip
        assert relative(got.ce, ce) <= 1e-12
        assert relative(got.kl, kl) <= 1e-12
        for mine, true in zip(gradients, dense(case, gamma=1.0, temperature=temperature)[1], strict=True):
            assert relative(mine, true) <= 1e-12


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.integers(1, 9), seed=st.integers(0, 99), scheme=st.sampled_from(SCHEMES))
def test_wider_padding_changes_nothing(extra: int, seed: int, scheme: str) -> None:
    case = make_case(scheme, n=9, vocab=31, seed=seed)
    wide = SparseTargets(
        F.pad(case.targets.ids, (0, extra), value=PADDING_ID),
        F.pad(case.targets.logprobs, (0, extra), value=NEG_INF),
        case.targets.tail,
    )
    want, want_gradients = linear(case, gamma=0.7, temperature=2.0)
    got, gradients = linear(replace(case, targets=wide), gamma=0.7, temperature=2.0)
    assert relative(got.total, want.total) <= 1e-14
    assert all(relative(a, b) <= 1e-13 for a, b in zip(gradients, want_gradients, strict=True))


def test_rows_without_targets_have_cross_entropy_alone() -> None:
    case = make_case("topk")
    targets = SparseTargets(
        torch.full((23, 5), PADDING_ID).int(), torch.full((23, 5), NEG_INF), torch.full((23,), NEG_INF)
    )
    case = replace(case, targets=targets)
    for direction in ("forward", "reverse"):
        for temperature in (1.0, 2.0):
            got, gradients = linear(case, gamma=5.0, temperature=temperature, direction=direction)
            _, want_gradients = linear(case, gamma=0.0)
            assert float(got.kl) == 0.0
            assert relative(got.total, F.cross_entropy(case.logits, case.labels, reduction="sum")) <= 1e-12
            assert all(relative(a, b) <= 1e-12 for a, b in zip(gradients, want_gradients, strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tail", [1e-7, 1e-4, 0.9999])
def test_tail_of_any_weight(tail: float, dtype: torch.dtype, direction: Any) -> None:
    case = make_case("topk")
    head = case.targets.logprobs.double().exp()
    head = head / head.sum(1, keepdim=True) * (1 - tail)
    targets = replace(case.targets, logprobs=head.log().float(), tail=torch.full((23,), math.log(tail)))
    assert_equals_reference(
        replace(case, targets=targets), dtype, gamma=0.7, temperature=2.0, direction=direction
    )


def test_tail_of_weight_zero_is_the_sum_over_the_ids() -> None:
    case = make_case("topk")
    log_head = case.targets.logprobs.log_softmax(1)
    targets = replace(case.targets, logprobs=log_head, tail=torch.full((23,), NEG_INF))
    case = replace(case, targets=targets)
    assert_equals_reference(case, gamma=0.7, temperature=2.0)
    live = case.labels != NO_LABEL
    log_s = (case.logits / 2).log_softmax(1).gather(1, case.targets.ids.long())
    want = (log_head.double().exp() * (log_head.double() - log_s))[live].sum()
    assert relative(linear(case, gamma=0.7, temperature=2.0)[0].kl, want) <= 1e-12


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("nats", [20, 50, 100, 300])
def test_student_tail_far_below_the_ids(nats: int, temperature: float, direction: Any) -> None:
    """1 - sum(kept) is 0 from 17 nats in float32: KL infinite, and a gradient of NaN."""
    case = make_case("topk", n=11)
    bias = case.bias.clone()
    bias[:5] += nats
    ids = torch.arange(5, dtype=torch.int32).expand(11, 5)
    case = replace(case, bias=bias, targets=replace(case.targets, ids=ids))
    options = {"gamma": 0.7, "temperature": temperature, "direction": direction}
    assert_equals_reference(case, **options)
    assert_equals_reference(case, torch.float32, bound=2e-5, **options)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_logits_of_200_nats(temperature: float) -> None:
    case = make_case("topk")
    case = replace(case, weight=case.weight * (200 / case.logits.abs().max()))
    assert_equals_reference(case, gamma=0.7, temperature=temperature)
    assert_equals_reference(case, torch.float32, bound=2e-5, gamma=0.7, temperature=temperature)


def test_a_common_offset_of_the_logits_costs_no_digits() -> None:
    """Logits near 1000 that differ by a few nats: CE as a difference of raw numbers loses 4 digits."""
    case = make_case("topk", d=1)
    case = replace(case, hidden=torch.ones_like(case.hidden), weight=torch.zeros_like(case.weight))
    case = replace(case, bias=(1000 + case.bias).float().double())
    for temperature in (1.0, 0.1):
        assert_equals_reference(case, torch.float32, gamma=0.7, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.1, 10.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_temperatures_far_from_one(scheme: str, temperature: float) -> None:
    case = make_case(scheme)
    assert_equals_reference(case, gamma=0.7, temperature=temperature)
    assert_equals_reference(case, torch.float32, gamma=0.7, temperature=temperature)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_masked_by_a_bias_of_minus_infinity(temperature: float, direction: Any) -> None:
    """A vocabulary padded to a multiple of 64 is often closed like this; its entries get no gradient."""
    case = make_case("topk", vocab=90)
    bias = torch.cat([case.bias, torch.full((7,), NEG_INF, dtype=torch.float64)])
    weight = torch.cat([case.weight, torch.ones(7, 13, dtype=torch.float64)])
    options: dict[str, Any] = {"gamma": 0.7, "temperature": temperature, "direction": direction}
    want, want_gradients = linear(case, **options)
    got, gradients = linear(replace(case, weight=weight, bias=bias), **options)
    assert relative(got.total, want.total) <= 1e-12
    assert relative(gradients[0], want_gradients[0]) <= 1e-12
    assert relative(gradients[1][:90], want_gradients[1]) <= 1e-12
    assert gradients[1][90:].abs().max() == 0
    assert gradients[2][90:].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_off_the_ids_is_there(temperature: float) -> None:
    """Losses that gather the kept logits and forget the rest leave it 0: the normaliser is missing."""
    case = make_case("pps", n=6, d=6)
    case = replace(case, hidden=torch.eye(6, dtype=torch.float64))
    case = replace(case, labels=torch.zeros(6, dtype=torch.int64))
    _, with_kl = linear(case, gamma=1.0, temperature=temperature)
    _, ce_only = linear(case, gamma=0.0, temperature=temperature)
    of_kl = (with_kl[1] - ce_only[1]).t()  # hidden = identity: row i is position i's logit gradient
    s = ((case.weight + case.bias[:, None]).t() / temperature).softmax(1)
    for i, ids in enumerate(case.targets.ids.tolist()):
        off = [v for v in range(97) if v not in ids]
        assert relative(of_kl[i, off], temperature * s[i, off]) <= 1e-6  # weights are float32


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"gradient_skip": 0.5}])
def test_memory_that_nobody_cleared_does_not_show(options: dict[str, Any]) -> None:
    """Fresh memory holds NaN here: what is only added to, or read where nothing was written, becomes NaN."""
    with poisoned_outputs():
        loss, gradients = linear(make_case("topk"), gamma=0.7, **options)
        _, none = linear(ignored(make_case("topk")), gamma=0.7, **options)
    assert all(x.isfinite().all() for x in (loss.total, *gradients))
    assert not any(gradient.any() for gradient in none)
