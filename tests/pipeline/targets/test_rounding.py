import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.targets import LOG_STEPS, NO_LOG, decode_log, label_codes
from ddk_pipe.pipeline.targets.rounding import rounded_up

RUNS = 10_000


@pytest.mark.parametrize("p", [1 - 1e-6, 1 - 1e-4, 1 - 2.5e-4, 0.9, 0.5, 0.02, 1e-5])
def test_the_mean_of_a_decoded_label_is_its_probability(p: float) -> None:
    logprobs = np.full(RUNS, np.log(p))
    decoded = decode_log(label_codes(logprobs, 0, "w"), none=np.nan).astype(np.float64)
    assert np.abs(decoded - np.log(p)).max() <= 1 / LOG_STEPS + 1e-6
    error = np.exp(decoded).std() / RUNS**0.5
    assert abs(np.exp(decoded).mean() - p) <= 4 * error + 1e-7 * p


def test_the_cross_entropy_of_labels_is_as_good_as_unbiased() -> None:
    """Unbiased p costs its logarithm at most 1 / (8 LOG_STEPS^2) on average; to the nearest, p near 1 cost all of -log p."""
    logprobs = np.log(np.linspace(0.9995, 1.0, 200_000))
    decoded = decode_log(label_codes(logprobs, 0, "w"), none=np.nan).astype(np.float64)
    error = decoded.std() / len(decoded) ** 0.5
    assert abs((decoded - logprobs).mean()) <= 4 * error + 1 / (8 * LOG_STEPS**2)


def test_codes_at_the_ends() -> None:
    values = np.array([np.nan, -np.inf, -1e9, 0.0, 1e-7, -31.9999])
    assert label_codes(values, 0, "w").tolist()[:5] == [NO_LOG, NO_LOG - 1, NO_LOG - 1, 0, 0]


def test_codes_are_a_pure_function_of_seed_window_and_position() -> None:
    logprobs = np.log(np.random.default_rng(0).random(500))
    codes = label_codes(logprobs, 3, "w")
    assert np.array_equal(codes, label_codes(logprobs, 3, "w"))
    changed = np.where(np.arange(500) == 7, -3.3, logprobs)
    assert np.array_equal(np.delete(codes, 7), np.delete(label_codes(changed, 3, "w"), 7))
    assert not np.array_equal(codes, label_codes(logprobs, 4, "w"))
    assert not np.array_equal(codes, label_codes(logprobs, 3, "x"))


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=100, deadline=None)
def test_errors_of_a_row_add_up_to_less_than_its_widest_cell(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    order = rng.permutation(len(rows))  # rows need not come in order
    rows, shares, widths = rows[order], rng.random(len(rows)), rng.exponential(size=len(rows))
    shares[rng.random(len(rows)) < 0.2] = 0.0
    shares[rng.random(len(rows)) < 0.2] = 1.0
    up = rounded_up(rows, shares, widths, rng.random(len(sizes)))
    assert not up[shares == 0].any() and up[shares == 1].all()
    for row in range(len(sizes)):
        mine = rows == row
        error = (widths * (up - shares))[mine].sum()
        assert abs(error) <= widths[mine].max(initial=0) + 1e-9


def test_every_value_is_rounded_up_as_often_as_its_share() -> None:
    shares, widths = np.array([0.1, 0.5, 0.03, 0.97, 0.5]), np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    rows = np.repeat(np.arange(RUNS), 5)
    offsets = np.random.default_rng(0).random(RUNS)
    up = rounded_up(rows, np.tile(shares, RUNS), np.tile(widths, RUNS), offsets)
    means = up.reshape(RUNS, 5).mean(0)
    assert np.abs(means - shares).max() <= 4 * 0.5 / RUNS**0.5
