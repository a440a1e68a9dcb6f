"""What arrays of domains may hold: by itself, and through every rule."""

import numpy as np
import pytest
from domain_losses import RATIOS, SIZES, N, losses

from ddk_pipe.pipeline.mixing import RULES, check_weights, ddk_initial, make_rule


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    rule = make_rule(name, sizes=SIZES)
    weights, student_ce, teacher_ce = np.full(N, 1 / N), *losses(RATIOS)
    broken = student_ce.copy()
    broken[3] = bad
    with pytest.raises(ValueError, match="student_ce of domain 3 is"):
        rule(weights, broken, teacher_ce)
    with pytest.raises(ValueError, match="teacher_ce of domain 3 is"):
        rule(weights, student_ce, broken)


@pytest.mark.parametrize("name", RULES)
def test_shapes_and_weights_that_make_no_sense_are_refused(name: str) -> None:
    rule = make_rule(name, sizes=SIZES)
    weights, student_ce, teacher_ce = np.full(N, 1 / N), *losses(RATIOS)
    with pytest.raises(ValueError, match="student_ce has 10 domains and teacher_ce has 9"):
        rule(weights, student_ce, teacher_ce[:9])
    with pytest.raises(ValueError, match="weights has 9 domains, expected 10"):
        rule(np.full(9, 1 / 9), student_ce, teacher_ce)
    with pytest.raises(ValueError, match=r"shape \[domains\], got \[1, 10\]"):
        rule(weights, student_ce[None], teacher_ce)
    with pytest.raises(ValueError, match=r"weights of domain 2 is -0\.1, below 0"):
        rule(np.array([0.3, 0.8, -0.1, *[0.0] * 7]), student_ce, teacher_ce)
    with pytest.raises(ValueError, match=r"weights must sum to 1, got 0\.0"):
        rule(np.zeros(N), student_ce, teacher_ce)
    with pytest.raises(ValueError, match="weights of domain 0 is nan"):
        rule(np.full(N, np.nan), student_ce, teacher_ce)


def test_no_domains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[0\]"):
        ddk_initial(np.array([]), np.array([]))


def test_check_weights_removes_rounding_but_not_mistakes() -> None:
    thirds = np.full(3, np.float32(1 / 3)).astype(np.float64)
    assert thirds.sum() != 1.0
    assert check_weights(thirds, domains=3).sum() == 1.0
    with pytest.raises(ValueError, match=r"must sum to 1, got 1\.01"):
        check_weights(np.array([0.51, 0.5]), domains=2)
