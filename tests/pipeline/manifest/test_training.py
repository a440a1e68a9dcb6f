"""What the section `distill` comes to in windows."""

from __future__ import annotations

from typing import Any

from ddk_pipe.pipeline.manifest import Distill, windows_per_domain


def options(**values: Any) -> Distill:
    return Distill.model_validate({"steps": 100, **values})


def test_validation_keeps_to_its_budget() -> None:
    given = options(validation_windows=500, interval_steps=10, batch_tokens=1000)
    assert windows_per_domain(given, 100, 5) == 2  # a tenth, if nothing is said
    assert windows_per_domain(given.model_copy(update={"validation_budget": None}), 100, 5) == 500
    for budget, expected in ((0.5, 10), (0.05, 1), (0.001, 1)):
        bounded = given.model_copy(update={"validation_budget": budget})
        assert windows_per_domain(bounded, 100, 5) == expected
        assert expected * 100 * 5 <= max(budget * 10_000, 500)
