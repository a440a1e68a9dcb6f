"""When a goal of the GPU benchmark counts as met."""

from __future__ import annotations

import pytest
from gpu.verdict import Goal, ratio

TIME = Goal("time", 1.15)
BUSY = Goal("busy", 0.97, at_least=True)
PEER = Goal("peer", 1.1, optional=True)


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (TIME, 1.15, True),
        (TIME, 1.16, False),
        (BUSY, 0.97, True),
        (BUSY, 0.96, False),
        (TIME, "ours: out of memory", False),
        (TIME, None, False),
        (PEER, "QuACK: not installed", None),
        (PEER, 1.2, False),
    ],
)
def test_on_a_gpu(goal: Goal, value: float | str | None, met: bool | None) -> None:
    found = goal.judged(value, "cuda")
    assert found["met"] is met and found["value"] in (value, "not measured")


@pytest.mark.parametrize("value", [0.5, 2.0, None, "not run"])
def test_on_a_cpu_nothing_is_met_or_missed(value: float | str | None) -> None:
    found = TIME.judged(value, "cpu")
    assert found["met"] is None and found["value"].startswith("not judged: on a CPU")


def test_a_ratio_says_which_of_the_two_did_not_run() -> None:
    ours, theirs = {"name": "ours", "seconds_median": 3.0}, {"name": "theirs", "seconds_median": 2.0}
    assert ratio(ours, theirs) == 1.5
    assert ratio(ours, {"name": "theirs", "not run": "no room"}) == "theirs: no room"
    assert ratio({"name": "ours"}, theirs) == "ours: no seconds_median"
