"""Domain weights against the equations of arXiv 2407.16154 and a hand-computed table of them."""

from collections.abc import Callable

import numpy as np
import pytest
from domain_losses import RATIOS, SIZES, N, losses
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ddk_pipe.pipeline.mixing import (
    RULES,
    FloatArray,
    Rule,
    ddk,
    ddk_initial,
    ddk_unsmoothed,
    doremi,
    gap_softmax,
    learnability,
    make_rule,
    natural,
    sheared,
    uniform,
)

TABLE = {  # updates: weight of domains 1, 2, 3 and of each of 4-10, at alpha 0.5
    0: (0.153865, 0.108427, 0.084443, 0.093324),
    1: (0.164340, 0.106779, 0.084438, 0.092063),
    2: (0.171409, 0.105590, 0.084235, 0.091252),
    5: (0.181341, 0.103786, 0.083712, 0.090166),
    10: (0.184838, 0.103099, 0.083472, 0.089799),
    30: (0.185322, 0.103000, 0.083437, 0.089749),
}
TABLE_30_BY_ALPHA = {
    0.9: (0.770880, 0.032867, 0.021820, 0.024919),
    1.0: (0.999979, 0.000019, 0.000000, 0.000000),
}
SIX_DIGITS = 0.5001e-6
PATIENT = settings(deadline=None)  # a busy host is no failure
finite_ce = st.floats(0.0, 60.0)
any_finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-3, 1.0)


def updated(ratios: FloatArray, *, updates: int, alpha: float = 0.5) -> FloatArray:
    student_ce, teacher_ce = losses(ratios)
    weights = ddk_initial(student_ce, teacher_ce)
    for _ in range(updates):
        weights = ddk(weights, student_ce, teacher_ce, alpha=alpha)
    return weights


def fixed_point(ratios: FloatArray, *, alpha: float) -> FloatArray:
    """r_i = ((1 - alpha)/N) / (1 - alpha e^ratio_i / Z), with Z bisected so that they sum to 1."""

    def at(z: float) -> FloatArray:
        share: FloatArray = (1 - alpha) / len(ratios) / (1 - alpha * np.exp(ratios) / z)
        return share

    low = alpha * np.exp(ratios.max()) * (1 + 1e-12)  # the sum falls from infinity as Z grows
    high = 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > 1 else (low, middle)
    return at(high)


def every_rule() -> list[Rule]:
    return [make_rule(name, alpha=0.5, sizes=SIZES) for name in RULES]


@st.composite
def mixtures(draw: st.DrawFn, ce: st.SearchStrategy[float]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(weights, student_ce, teacher_ce) of N domains; some weights may be 0."""
    raw = draw(arrays(np.float64, N, elements=st.one_of(st.just(0.0), positive)))
    raw[draw(st.integers(0, N - 1))] = 1.0
    student_ce = draw(arrays(np.float64, N, elements=ce))
    return raw / raw.sum(), student_ce, draw(arrays(np.float64, N, elements=ce))


@pytest.mark.parametrize("updates", TABLE)
def test_table_of_the_notes_to_six_digits(updates: int) -> None:
    *first, rest = TABLE[updates]
    expected = [*first, *[rest] * 7]
    np.testing.assert_allclose(updated(RATIOS, updates=updates), expected, rtol=0, atol=SIX_DIGITS)


@pytest.mark.parametrize("alpha", TABLE_30_BY_ALPHA)
def test_table_at_other_alphas_to_six_digits(alpha: float) -> None:
    *first, rest = TABLE_30_BY_ALPHA[alpha]
    actual = updated(RATIOS, updates=30, alpha=alpha)
    np.testing.assert_allclose(actual, [*first, *[rest] * 7], rtol=0, atol=SIX_DIGITS)


def test_equations_written_out_naively() -> None:
    student_ce, teacher_ce = losses(RATIOS)
    ratio = np.exp(student_ce) / np.exp(teacher_ce)
    np.testing.assert_allclose(
        ddk_initial(student_ce, teacher_ce), np.exp(ratio) / np.exp(ratio).sum(), rtol=1e-12
    )
    weights = SIZES / SIZES.sum()
    psi = weights * np.exp(ratio)
    np.testing.assert_allclose(
        ddk(weights, student_ce, teacher_ce, alpha=0.3), 0.3 * psi / psi.sum() + 0.7 / N, rtol=1e-12
    )


@pytest.mark.parametrize(
    "ratios",
    [np.linspace(1.2, 1.8, N), np.array([3.0] + [1.2] * 9), RATIOS, np.array([0.5, 6.0, 1.0])],
)
def test_thirty_updates_reach_the_fixed_point_within_5_percent(ratios: FloatArray) -> None:
    np.testing.assert_allclose(updated(ratios, updates=30), fixed_point(ratios, alpha=0.5), rtol=0.05)


def test_mild_ratios_stay_near_uniform_and_one_laggard_does_not() -> None:
    mild = N * updated(np.linspace(1.2, 1.8, N), updates=100)
    assert (round(mild.max(), 2), round(mild.min(), 2)) == (1.39, 0.77)
    one = N * updated(np.array([3.0] + [1.2] * 9), updates=100)
    assert round(one.max(), 1) == 4.7


def test_without_the_constant_term_one_domain_takes_everything() -> None:
    assert updated(RATIOS, updates=60, alpha=1.0)[0] > 1 - 1e-9
    assert updated(RATIOS, updates=60, alpha=0.5)[0] < 0.2


@PATIENT
@given(mixtures(finite_ce), st.floats(0.0, 1.0))
def test_ddk_stays_within_its_bounds(
    mixture: tuple[FloatArray, FloatArray, FloatArray], alpha: float
) -> None:
    weights = ddk(*mixture, alpha=alpha)
    floor = (1 - alpha) / N
    assert weights.min() >= floor - 1e-15
    assert weights.max() <= alpha + floor + 1e-15


@PATIENT
@given(mixtures(any_finite))
def test_every_rule_returns_a_distribution_for_any_finite_loss(
    mixture: tuple[FloatArray, FloatArray, FloatArray],
) -> None:
    for rule in every_rule():
        weights = rule(*mixture)
        assert weights.shape == (N,) and weights.dtype == np.float64
        assert np.isfinite(weights).all() and weights.min() >= 0
        assert weights.sum() == pytest.approx(1.0, abs=1e-14)


@PATIENT
@given(mixtures(st.floats(0.0, 8.0)), st.permutations(range(N)))
def test_the_order_of_the_domains_does_not_matter(
    mixture: tuple[FloatArray, FloatArray, FloatArray], order: list[int]
) -> None:
    for name in RULES:
        straight = make_rule(name, sizes=SIZES)(*mixture)
        permuted = make_rule(name, sizes=SIZES[order])(*(part[order] for part in mixture))
        np.testing.assert_allclose(permuted, straight[order], rtol=1e-9, atol=1e-300)


def test_rules_leave_their_arguments_alone() -> None:
    student_ce, teacher_ce = losses(RATIOS)
    weights = np.full(N, 1 / N)
    before = [weights.copy(), student_ce.copy(), teacher_ce.copy()]
    for rule in every_rule():
        rule(weights, student_ce, teacher_ce)
    np.testing.assert_array_equal([weights, student_ce, teacher_ce], before)


@pytest.mark.parametrize("gap_nats", [7.0, 50.0, 709.0, 710.0, 5000.0, 1e308])
def test_a_hopeless_domain_takes_everything_and_no_more(gap_nats: float) -> None:
    student_ce, teacher_ce = np.array([1.0, gap_nats, 1.0, 1.0]), np.zeros(4)
    np.testing.assert_array_equal(ddk_initial(student_ce, teacher_ce), [0, 1, 0, 0])
    actual = ddk(np.full(4, 0.25), student_ce, teacher_ce)
    np.testing.assert_allclose(actual, [0.125, 0.625, 0.125, 0.125], rtol=1e-15)


def test_of_two_overflowing_ratios_the_larger_wins_and_equal_ones_share() -> None:
    np.testing.assert_array_equal(ddk_initial(np.array([900.0, 800.0]), np.zeros(2)), [1, 0])
    np.testing.assert_array_equal(ddk_initial(np.array([900.0, 900.0]), np.zeros(2)), [0.5, 0.5])


def test_gaps_that_overflow_are_still_a_distribution() -> None:
    student_ce, teacher_ce = np.array([1e308, 1e308, -1e308]), np.array([-1e308, -1e308, 1e308])
    np.testing.assert_array_equal(ddk_initial(student_ce, teacher_ce), [0.5, 0.5, 0])
    for name in RULES:
        weights = make_rule(name, sizes=[1, 1, 1])(np.full(3, 1 / 3), student_ce, teacher_ce)
        assert weights.sum() == pytest.approx(1.0, abs=1e-15)


def test_a_hopeless_domain_without_weight_does_not_hide_the_others() -> None:
    weights = np.array([0.0, 0.5, 0.5])
    student_ce = np.array([5000.0, np.log(2.0), 0.0])  # ratios: beyond any float, 2, 1
    actual = ddk(weights, student_ce, np.zeros(3), alpha=1.0)
    np.testing.assert_allclose(actual, [0, np.e / (1 + np.e), 1 / (1 + np.e)], rtol=1e-14)


def test_unsmoothed_is_equation_1_whatever_the_weights() -> None:
    student_ce, teacher_ce = losses(RATIOS)
    actual = ddk_unsmoothed(SIZES / SIZES.sum(), student_ce, teacher_ce)
    np.testing.assert_array_equal(actual, ddk_initial(student_ce, teacher_ce))


def test_relatives_written_out_naively() -> None:
    weights = np.array([0.2, 0.3, 0.5])
    student_ce, teacher_ce = np.array([3.0, 2.0, 1.0]), np.array([2.5, 2.1, 1.0])
    gap_nats = np.array([0.5, -0.1, 0.0])

    def tilted(scores: FloatArray) -> FloatArray:
        raw: FloatArray = weights * np.exp(scores)
        mixed: FloatArray = 0.9 * raw / raw.sum() + 0.1 / 3
        return mixed

    clipped = doremi(weights, student_ce, teacher_ce, eta=2.0, floor=0.1)
    np.testing.assert_allclose(clipped, tilted(2 * np.maximum(gap_nats, 0)), rtol=1e-12)
    signed = sheared(weights, student_ce, teacher_ce, eta=2.0, floor=0.1)
    np.testing.assert_allclose(signed, tilted(2 * gap_nats), rtol=1e-12)
    soft = np.exp(gap_nats / 0.5)
    np.testing.assert_allclose(
        gap_softmax(weights, student_ce, teacher_ce, temperature=0.5), soft / soft.sum(), rtol=1e-12
    )
    np.testing.assert_allclose(uniform(weights, student_ce, teacher_ce), [1 / 3] * 3, rtol=1e-15)
    np.testing.assert_allclose(
        natural(weights, student_ce, teacher_ce, sizes=[1, 0, 3]), [0.25, 0, 0.75], rtol=1e-15
    )


def test_default_floor_keeps_a_leading_domain_alive() -> None:
    weights = np.array([0.5, 0.5])
    for rule in (doremi, sheared):
        for _ in range(50):
            weights = rule(weights, np.array([3.0, 1.0]), np.array([1.0, 2.0]))
        assert 1e-4 / 2 <= weights[1] < 1e-4  # the floor's share, and a little of its own


def test_learnability_is_what_a_window_took_off_the_loss() -> None:
    before, now = np.array([5.0, 4.0, 9.0, 3.0]), np.array([4.0, 3.5, 9.0, 3.2])
    weights = np.array([0.5, 0.125, 0.25, 0.125])
    found = learnability(weights, now, np.zeros(4), student_ce_before=before, floor=0.2)
    # a nat for half of the windows, half a nat for an eighth of them; nothing; a loss that rose
    np.testing.assert_allclose(found, [0.05 + 0.8 * 2 / 6, 0.05 + 0.8 * 4 / 6, 0.05, 0.05], rtol=1e-14)


def test_learnability_leaves_a_gap_that_does_not_close_with_the_floor_however_large() -> None:
    before = np.array([3.0, 3.0, 50.0])
    weights = np.full(3, 1 / 3)
    for _ in range(3):
        now = before - [0.1, 0.1, 0.0]
        weights, before = learnability(weights, now, np.zeros(3), student_ce_before=before), now
    assert weights[2] == pytest.approx(0.5 / 3)


def test_learnability_is_even_where_nothing_is_known() -> None:
    weights, ce = np.array([0.8, 0.2]), np.array([2.0, 3.0])
    for before in (None, ce, ce - 1.0):  # no interval before; nothing moved; everything got worse
        np.testing.assert_array_equal(learnability(weights, ce, ce, student_ce_before=before), [0.5, 0.5])
    alone = learnability(np.array([1.0, 0.0]), ce, ce, student_ce_before=np.array([2.0, 4.0]), floor=0.0)
    np.testing.assert_array_equal(alone, [0.5, 0.5])  # what fell had no window: by others' training


@PATIENT
@given(mixtures(any_finite), arrays(np.float64, N, elements=any_finite), st.permutations(range(N)))
def test_learnability_is_a_distribution_with_a_floor_whatever_the_order(
    mixture: tuple[FloatArray, FloatArray, FloatArray], before: FloatArray, order: list[int]
) -> None:
    weights = learnability(*mixture, student_ce_before=before)
    assert weights.min() >= 0.5 / N - 1e-15 and weights.sum() == pytest.approx(1.0, abs=1e-14)
    permuted = learnability(*(part[order] for part in mixture), student_ce_before=before[order])
    np.testing.assert_allclose(permuted, weights[order], rtol=1e-9)


def test_learnability_refuses_losses_before_that_do_not_fit() -> None:
    weights, ce = np.array([0.5, 0.5]), np.array([2.0, 3.0])
    with pytest.raises(ValueError, match="student_ce_before has 1 domains and student_ce has 2"):
        learnability(weights, ce, ce, student_ce_before=ce[:1])
    with pytest.raises(ValueError, match="student_ce_before of domain 1 is nan"):
        learnability(weights, ce, ce, student_ce_before=np.array([1.0, np.nan]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: ddk(*a, alpha=1.5), "alpha must be between 0 and 1, got 1.5"),
        (lambda *a: ddk(*a, alpha=float("nan")), "alpha must be between 0 and 1, got nan"),
        (lambda *a: doremi(*a, floor=-0.1), "floor must be between 0 and 1, got -0.1"),
        (lambda *a: sheared(*a, eta=-1.0), "eta must be at least 0 and finite, got -1.0"),
        (lambda *a: gap_softmax(*a, temperature=0.0), "temperature must be positive and finite"),
        (lambda *a: learnability(*a, floor=1.1), "floor must be between 0 and 1, got 1.1"),
        (lambda *a: natural(*a, sizes=[1, 2]), "sizes has 2 domains, expected 10"),
        (lambda *a: natural(*a, sizes=[-1] * N), "sizes of domain 0 is -1.0, below 0"),
        (lambda *a: natural(*a, sizes=[0] * N), "sizes are all 0"),
    ],
)
def test_options_out_of_range_are_refused(call: Callable[..., FloatArray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.full(N, 1 / N), *losses(RATIOS))


def test_a_prior_takes_the_place_of_one_over_n() -> None:
    student_ce, teacher_ce = losses(RATIOS)
    weights, prior = np.full(N, 1 / N), SIZES / SIZES.sum()
    ratio = np.exp(student_ce - teacher_ce)
    psi = weights * np.exp(ratio)
    expected = 0.3 * psi / psi.sum() + 0.7 * prior
    np.testing.assert_allclose(
        ddk(weights, student_ce, teacher_ce, alpha=0.3, prior=prior), expected, rtol=1e-12
    )
    even = ddk(weights, student_ce, teacher_ce, prior=weights)
    np.testing.assert_allclose(even, ddk(weights, student_ce, teacher_ce), rtol=1e-12)
    with pytest.raises(ValueError, match="must sum to 1"):
        ddk(weights, student_ce, teacher_ce, prior=2 * prior)


def test_a_clamp_makes_hopeless_domains_equal() -> None:
    student_ce, teacher_ce = losses(np.array([20.0, 8.0, 1.5, 1.2]))
    clamped = ddk(np.full(4, 0.25), student_ce, teacher_ce, largest_ratio=2.0)
    expected = ddk(np.full(4, 0.25), *losses(np.array([2.0, 2.0, 1.5, 1.2])))
    np.testing.assert_allclose(clamped, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="largest_ratio must be positive"):
        ddk(np.full(4, 0.25), student_ce, teacher_ce, largest_ratio=0.0)
