"""Skipping in the backward of the output layer: unbiased, and refused where it does not exist."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loss_cases import BOUND, Case, ignored, linear, logit_gradient, make_case, relative
from torch import Tensor

from ddk_pipe.pipeline.losses import gradient_skip, linear_sparse_kd
from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip, Survivors, expected_share

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")

TAU = 0.03  # of a gradient whose entries lie within [-1.7, 1.7]


def concentrated_case(n: int = 11, vocab: int = 1500) -> Case:
    """Peaked like a language model: few of the 1500 entries of a row matter."""
    return make_case("topk", n=n, vocab=vocab, d=9, k=17, seed=3, scale=0.9)


def always_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_skip, "BREAK_EVEN_SHARE", float("inf"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_logit_gradient(case: Case, **options: Any) -> Tensor:
    """G [N, V] in float64."""
    return logit_gradient(case, **options)[1]


def mean_of_draws(case: Case, draws: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Mean gradients of hidden and weight over the draws, and the mean square of either one's error."""
    _, exact = linear(case, dtype, gamma=0.7)
    sums = [torch.zeros_like(x) for x in exact[:2]]
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(draws):
        _, got = linear(case, dtype, gamma=0.7, gradient_skip=TAU, generator=seeded(seed))
        for i in range(2):
            sums[i] += got[i]
            squares[i] += (got[i] - exact[i]).double().square().sum()
        assert torch.equal(got[2], exact[2])  # bias
    return [x / draws for x in sums], squares / draws


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_skipping_is_unbiased_and_its_error_is_the_stated_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean of 400 draws, bound 3 sigma of it. Dropping the same elements misses it by a wide margin."""
    always_skip(monkeypatch)
    case, draws = concentrated_case(), 400
    g = dense_logit_gradient(case, gamma=0.7)
    exact = [g @ case.weight, g.t() @ case.hidden]
    variance = g.abs() * (TAU - g.abs()).clamp_min(0)
    stated = [
        (variance.sum(0) * case.weight.square().sum(1)).sum(),
        (variance.sum(1) * case.hidden.square().sum(1)).sum(),
    ]
    means, squares = mean_of_draws(case, draws, dtype)
    dropped = torch.where(g.abs() < TAU, 0.0, g)
    biased = [dropped @ case.weight, dropped.t() @ case.hidden]
    for mean, square, true, bias, error in zip(means, squares, exact, biased, stated, strict=True):
        bound = 3 * math.sqrt(error / draws)
        assert float((mean.double() - true).norm()) <= bound
        assert float((bias - true).norm()) > 3 * bound  # the test has teeth
        assert float(square) == pytest.approx(float(error), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_skipping_with_a_threshold_of_almost_0_is_exact(
    temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_skip(monkeypatch)
    case = concentrated_case()
    for options in ({}, {"softcap": 5.0}, {"direction": "reverse"}):
        common: dict[str, Any] = {"gamma": 0.7, "temperature": temperature, **options}
        want, want_gradients = linear(case, dtype, **common)
        got, gradients = linear(case, dtype, gradient_skip=1e-30, **common)
        assert torch.equal(got.total, want.total)
        assert not torch.equal(gradients[1], want_gradients[1])  # it did take the other products
        for mine, true in zip(gradients, want_gradients, strict=True):
            assert relative(mine, true) <= BOUND[dtype]


def test_skipping_leaves_the_loss_and_the_bias_gradient_as_they_are() -> None:
    case = concentrated_case()
    want, want_gradients = linear(case, gamma=0.7)
    got, gradients = linear(case, gamma=0.7, gradient_skip=TAU, generator=seeded(0))
    for name in ("total", "ce", "kl"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.equal(gradients[2], want_gradients[2])
    for i in range(2):
        assert 1e-4 < relative(gradients[i], want_gradients[i]) < 0.5


@pytest.mark.parametrize("which", [0, 1])
def test_skipping_where_one_gradient_is_wanted(which: int) -> None:
    case = concentrated_case()
    _, both = linear(case, gamma=0.7, gradient_skip=TAU, generator=seeded(4))
    inputs = [case.hidden.clone(), case.weight.clone()]
    inputs[which].requires_grad_()
    loss = linear_sparse_kd(
        inputs[0], inputs[1], case.labels, case.targets,
        gamma=0.7, bias=case.bias, gradient_skip=TAU, generator=seeded(4),
    )  # fmt: skip
    (got,) = torch.autograd.grad(loss.total, inputs[which])
    assert torch.equal(got, both[which])


def test_skipping_is_reproducible() -> None:
    case = concentrated_case()

    def weight_gradient(generator: torch.Generator | None) -> Tensor:
        return linear(case, gamma=0.7, gradient_skip=TAU, generator=generator)[1][1]

    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = weight_gradient(seeded(1))
    assert torch.equal(weight_gradient(seeded(1)), first)
    assert not torch.equal(weight_gradient(seeded(2)), first)
    assert torch.equal(torch.get_rng_state(), before)  # a generator of its own leaves the default one alone
    default = weight_gradient(None)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weight_gradient(None), default)
    torch.manual_seed(11)
    assert torch.equal(weight_gradient(None), default)


def test_a_flat_gradient_gets_exact_products_and_draws_nothing() -> None:
    case = replace(concentrated_case(), hidden=torch.zeros(11, 9, dtype=torch.float64))
    case = replace(case, bias=0 * case.bias)
    _, exact = linear(case, gamma=0.7)
    generator = seeded(1)
    before = generator.get_state()
    _, got = linear(case, gamma=0.7, gradient_skip=1e-3, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    assert torch.equal(generator.get_state(), before)


def test_each_chunk_falls_back_for_itself() -> None:
    """Five peaked positions in the first chunk, five flat ones in the second."""
    case = concentrated_case(n=10)
    hidden = 3 * case.hidden
    hidden[5:] = 0
    case = replace(case, hidden=hidden, bias=0 * case.bias, labels=case.targets.ids[:, 0].long())
    _, exact = linear(case, gamma=0.7)
    _, got = linear(case, gamma=0.7, gradient_skip=TAU / 10, generator=seeded(1))
    assert torch.equal(got[0][5:], exact[0][5:])
    assert all(not torch.equal(a, b) for a, b in zip(got[0][:5], exact[0][:5], strict=True))


def test_the_fall_back_looks_at_the_gradient_not_at_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing the draws that turn out dense would bias those that remain."""
    g = dense_logit_gradient(concentrated_case(), gamma=0.7)[:1]
    share = expected_share(g, TAU)
    kept = [len(GradientSkip(TAU, seeded(i)).draw(g).values) / g.numel() for i in range(50)]
    assert min(kept) < share < max(kept)
    assert sum(kept) / 50 == pytest.approx(share, rel=0.05)
    for break_even, pays in ((share * 1.001, True), (share * 0.999, False)):
        monkeypatch.setattr(gradient_skip, "BREAK_EVEN_SHARE", break_even)
        assert GradientSkip(TAU).pays(g) is pays


def test_skipping_draws_nothing_where_no_gradient_is_formed() -> None:
    case, generator = concentrated_case(), seeded(1)
    before = generator.get_state()
    plain = (case.hidden, case.weight, case.labels, case.targets)
    linear_sparse_kd(*plain, gamma=0.7, gradient_skip=TAU, generator=generator)
    bias = case.bias.clone().requires_grad_()
    linear_sparse_kd(*plain, gamma=0.7, bias=bias, gradient_skip=TAU, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_skipping_with_nothing_labelled() -> None:
    _, gradients = linear(ignored(concentrated_case()), gamma=0.7, gradient_skip=TAU)
    assert all(float(x.abs().max()) == 0 for x in gradients)


def test_skipping_does_not_hide_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """|NaN| >= threshold is false: a survivor mask by >= would drop every NaN and train on."""
    always_skip(monkeypatch)
    case = concentrated_case()
    hidden = case.hidden.clone()
    hidden[2, 0] = float("nan")
    _, gradients = linear(replace(case, hidden=hidden), gamma=0.7, gradient_skip=TAU)
    assert gradients[0][2].isnan().all()
    assert gradients[1].isnan().all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 9),
    vocab=st.integers(1, 40),
    block=st.sampled_from([1, 7, 64, 100, 2**19]),
    tau=st.floats(1e-3, 3),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(n=5, vocab=30, block=100, tau=0.5, seed=0, dtype=torch.float32)  # the last block is shorter
def test_survivors_of_any_shape(
    n: int, vocab: int, block: int, tau: float, seed: int, dtype: torch.dtype
) -> None:
    """Elements of tau or more stay, others are 0 or +-tau; the products are those of the dense matrix."""
    gen = seeded(seed)
    g, weight, hidden = (torch.randn(s, dtype=dtype, generator=gen) for s in ((n, vocab), (vocab, 3), (n, 3)))
    g[torch.rand(n, vocab, generator=gen) < 0.3] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_skip, "_BLOCK_ELEMENTS", block)
        patch.setattr(gradient_skip, "_BLOCK_ROWS", block)
        found = GradientSkip(tau, gen).draw(g)
        out = torch.ones(vocab, 3, dtype=dtype)
        found.add_transposed_times_(out, hidden)
    dense_found = to_dense(found, n, vocab)
    limit = torch.tensor(tau, dtype=dtype)
    large = g.abs() >= limit
    assert torch.equal(dense_found[large], g[large])
    small = dense_found[~large]
    assert torch.equal(small[small != 0], (g[~large].sign() * limit)[small != 0])
    assert bool((g[dense_found != 0] != 0).all())
    assert relative(found.times(weight), dense_found.double() @ weight.double()) <= 1e-5
    assert relative(out, 1 + dense_found.double().t() @ hidden.double()) <= 1e-5


def to_dense(found: Survivors, n: int, vocab: int) -> Tensor:
    """By the row starts, so that they are checked against `rows` as well."""
    out = found.values.new_zeros(n, vocab)
    for row in range(n):
        part = slice(int(found.starts[row]), int(found.starts[row + 1]))
        assert bool((found.rows[part] == row).all())
        out[row, found.columns[part]] = found.values[part]
    return out


def test_thresholds_are_uniform_independent_in_rows_and_columns_and_finer_than_float32() -> None:
    t = gradient_skip._thresholds(torch.empty(300, 2000), 1.0, seeded(0))
    assert t.shape == (300, 2000)
    assert 0 < float(t.min()) < 1e-4
    assert 0.9999 < float(t.max()) < 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02)
    steps = t * 2**24
    assert not torch.equal(steps, steps.round())
    assert len(set(t[0].tolist())) == 2000
    assert len(set(t[:, 0].tolist())) == 300


@pytest.mark.parametrize("tau", [0.0, -1e-3, float("nan"), float("inf")])
def test_impossible_thresholds_are_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"gradient_skip {tau}: expected a finite number > 0"):
        linear(make_case("topk"), gamma=1.0, gradient_skip=tau)


def test_skipping_is_refused_where_it_does_not_exist() -> None:
    case = make_case("topk")
    with pytest.raises(NotImplementedError, match=r'gradient_skip with implementation "triton"'):
        linear(case, gamma=1.0, gradient_skip=1e-3, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"gradient_skip .* on meta"):
        linear_sparse_kd(
            case.hidden.to("meta"), case.weight, case.labels, case.targets, gamma=1.0, gradient_skip=1e-3
        )
