"""Rules and initial draws by name, with their options; users' own rules."""

from pathlib import Path

import numpy as np
import pytest
from domain_losses import RATIOS, SIZES, N, losses

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.mixing import InitialDraw, ddk_initial, doremi, initial_weights, make_rule


def test_only_rules_that_ask_for_it_see_the_update_before() -> None:
    weights, before, now = np.array([0.5, 0.5]), np.array([4.0, 4.0]), np.array([3.0, 4.0])
    even = make_rule("uniform", sizes=[1, 1])
    np.testing.assert_array_equal(even(weights, now, now, student_ce_before=before), [0.5, 0.5])
    found = make_rule("learnability", sizes=[1, 1], options={"floor": 0.0})
    np.testing.assert_array_equal(found(weights, now, now, student_ce_before=before), [1.0, 0.0])


def test_make_rule_fills_in_only_what_the_rule_takes() -> None:
    weights, student_ce, teacher_ce = np.full(N, 1 / N), *losses(RATIOS)
    np.testing.assert_array_equal(
        make_rule("ddk", alpha=0.0, sizes=SIZES)(weights, student_ce, teacher_ce), weights
    )
    np.testing.assert_allclose(
        make_rule("natural", alpha=0.0, sizes=SIZES)(weights, student_ce, teacher_ce), SIZES / 55
    )


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(DdkError, match="no mixing rule 'dorami'; use 'doremi', or one of ddk, "):
        make_rule("dorami", sizes=SIZES)
    with pytest.raises(DdkError, match="use '"):
        make_rule("", sizes=SIZES)
    student_ce, teacher_ce = losses(RATIOS)
    with pytest.raises(DdkError, match="no initial draw 'unifrom'; use 'uniform'"):
        initial_weights(
            "unifrom",  # type: ignore[arg-type]
            student_ce=student_ce,
            teacher_ce=teacher_ce,
            sizes=SIZES,
        )


@pytest.mark.parametrize("initial", ["uniform", "ddk", "natural"])
def test_initial_draws(initial: InitialDraw) -> None:
    student_ce, teacher_ce = losses(RATIOS)
    expected = {
        "uniform": np.full(N, 0.1),
        "ddk": ddk_initial(student_ce, teacher_ce),
        "natural": SIZES / 55,
    }
    actual = initial_weights(initial, student_ce=student_ce, teacher_ce=teacher_ce, sizes=SIZES)
    np.testing.assert_allclose(actual, expected[initial], rtol=1e-15)


def test_options_go_to_the_rule_and_unknown_ones_are_refused() -> None:
    student_ce, teacher_ce = losses(RATIOS)
    weights = np.full(N, 1 / N)
    rule = make_rule("doremi", sizes=SIZES, options={"eta": 0.5})
    np.testing.assert_array_equal(
        rule(weights, student_ce, teacher_ce), doremi(weights, student_ce, teacher_ce, eta=0.5)
    )
    with pytest.raises(
        DdkError, match="no option of the mixing rule doremi 'etta'; use 'eta', or one of eta, floor"
    ):
        make_rule("doremi", sizes=SIZES, options={"etta": 0.5})
    with pytest.raises(
        DdkError, match="no option of the mixing rule uniform 'eta'; leave it out, it has none"
    ):
        make_rule("uniform", sizes=SIZES, options={"eta": 0.5})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's package with two rules, as pip would have installed it."""
    (tmp_path / "users_rules.py").write_text(
        "def largest(weights, student_ce, teacher_ce, *, share=0.9):\n"
        "    out = weights * 0 + (1 - share) / (len(weights) - 1)\n"
        "    out[(student_ce - teacher_ce).argmax()] = share\n"
        "    return out\n"
        "def fallen(weights, student_ce, teacher_ce, student_ce_before):\n"
        "    return (student_ce_before - student_ce) / (student_ce_before - student_ce).sum()\n"
        "def broken(weights, student_ce, teacher_ce):\n"
        "    return weights * 2\n"
    )
    info = tmp_path / "users_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: users-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ddk_pipe.mixing]\nlargest = users_rules:largest\nfallen = users_rules:fallen\nbroken = users_rules:broken\n"
        "gone = users_rules:gone\nuniform = users_rules:broken\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_a_users_own_rule_is_found_checked_and_never_in_place_of_ours() -> None:
    student_ce, teacher_ce = losses(RATIOS)
    weights = np.full(N, 1 / N)
    found = make_rule("largest", sizes=SIZES, options={"share": 0.55})(weights, student_ce, teacher_ce)
    np.testing.assert_allclose(found, [0.55, *[0.05] * 9])
    fell = make_rule("fallen", sizes=SIZES)
    before = student_ce + np.arange(N)
    found = fell(weights, student_ce, teacher_ce, student_ce_before=before)
    np.testing.assert_allclose(found, np.arange(N) / 45, atol=1e-12)
    with pytest.raises(
        DdkError, match=r"mixing rule 'broken': weights must sum to 1, got 2\.0.*users_rules:broken"
    ):
        make_rule("broken", sizes=SIZES)(weights, student_ce, teacher_ce)
    with pytest.raises(DdkError, match="'gone': users_rules:gone cannot be loaded"):
        make_rule("gone", sizes=SIZES)
    np.testing.assert_allclose(make_rule("uniform", sizes=SIZES)(weights, student_ce, teacher_ce), weights)
    with pytest.raises(DdkError, match="no mixing rule 'larges'; use 'largest'"):
        make_rule("larges", sizes=SIZES)
