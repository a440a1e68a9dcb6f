"""The study's arithmetic, against what can be worked out by hand."""

from __future__ import annotations

import math

import page
import pytest
import study
import yaml
from estimates import Estimate, figures_of_run, holm, paired


def test_standard_error_and_p() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.error == pytest.approx(1 / math.sqrt(3))
    # Student's t with 2 degrees of freedom has the closed form p = 1 - t / sqrt(2 + t^2)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_one_seed_has_no_error() -> None:
    assert math.isnan(Estimate.of([1.0]).error)


def test_paired_differences_use_the_common_seeds() -> None:
    """What two arms share cancels: the error is that of the difference."""
    found = paired({0: 10.1, 1: 20.1, 2: 30.1}, {0: 10.0, 1: 20.0, 3: 5.0})
    assert (
        found.seeds == 2 and found.mean == pytest.approx(0.1) and found.error == pytest.approx(0, abs=1e-12)
    )


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.9], [1.0, 1.0]), ([], [])],
)
def test_holm(given: list[float], adjusted: list[float]) -> None:
    assert holm(given) == pytest.approx(adjusted)


def test_figures_of_a_run() -> None:
    rows = [
        {"domain": "a", "student_ce": 3.0, "teacher_ce": 2.0, "natural_share": 0.75},
        {"domain": "b", "student_ce": 5.0, "teacher_ce": 2.0, "natural_share": 0.25},
    ]
    found = figures_of_run([{**row, "kl": 1.0, "ece": 0.1, "agreement": 0.5} for row in rows])
    assert found["mean_gap"] == 2 and found["worst_gap"] == 3
    assert found["mean_ce"] == 4 and found["natural_ce"] == 3.5


@pytest.mark.parametrize("table", study.TABLES)
def test_every_arm_of_a_table_has_a_name_of_its_own(table: str) -> None:
    sweep = yaml.safe_load((study.HERE / f"{table}.yaml").read_text(encoding="utf-8"))
    variants = sweep["runs"]
    assert len({page.NAMES[table](variant) for variant in variants}) == len(variants)
    assert table in page.PARTS and f"{{{{{table}}}}}" in (page.HERE / "page.md").read_text(encoding="utf-8")


def test_a_sweep_says_what_models_and_caches_it_wants() -> None:
    sweep = {
        "manifest": "study.yaml",
        "set": {"distill.gamma": 0.2, "teacher.model": "material/teacher-near"},
        "grid": {"student.model": ["material/student-even"]},
        "runs": [{}, {"distill.alpha": 1.0}, {"cache.tau": 0.05, "cache.path": "other"}],
    }
    assert study.models(sweep) == {"teacher-near", "student-even"}
    real = {"manifest": "smollm.yaml", "grid": {"student.keep_layers": [[0, 1]]}, "runs": [{}]}
    assert study.models(real) == {"smollm2"}
    near = {"teacher.model": "material/teacher-near"}
    assert study.caches(sweep) == [near, {**near, "cache.tau": 0.05, "cache.path": "other"}]
