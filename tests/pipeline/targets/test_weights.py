from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.targets import LEVELS, Context, Plan
from ddk_pipe.pipeline.targets.weights import WeightCodec


def plan(scheme: str, tau: float = 0.02, cap: int = 50) -> Plan:
    return Plan(scheme, tau, 8, cap, 50, (1.0,), 0)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk"])
@given(weight=st.floats(0.0101, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_code_is_an_end_of_the_cell_around_the_weight(scheme: str, weight: float, seed: int) -> None:
    """The stated bound: within a cell under pps, within half of one elsewhere."""
    codec = WeightCodec(plan(scheme, tau=0.01, cap=100))
    context = Context.none(1)
    weights = np.array([weight / 2, weight])  # the second is the largest, whose slot is the rest's under pps
    codes = codec.codes(weights, np.zeros(2, np.int64), np.array([0.001]), replace(context, key=f"{seed}"))
    bound = codec.cell(weight / 2) * (1.0 if scheme == "pps" else 0.5) + 1e-12
    assert abs(codec._weights[codes[0]] - max(weight / 2, codec.lowest)) <= bound
    assert (codes[1] > LEVELS) == (scheme == "pps")
    assert codec.cell(weight) <= 4.2 / LEVELS * (1 - codec.lowest**0.25)


def test_rounding_to_the_nearest_would_be_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of no bias in test_codec.py can fail: without the random rounding the mean is off by much of a cell."""
    codec = WeightCodec(plan("pps"))
    weight = codec._weights[20] + 0.4 * codec.cell(codec._weights[20])
    weights, rows, mass = np.array([weight, 0.5]), np.zeros(2, np.int64), np.array([0.1])

    def off() -> float:
        contexts = [replace(Context.none(1), key=str(number)) for number in range(1000)]
        decoded = [codec._weights[codec.codes(weights, rows, mass, context)[0]] for context in contexts]
        return float(abs(np.mean(decoded) - weight) / codec.cell(weight))

    assert off() < 0.08
    monkeypatch.setattr(codec, "_uniforms", lambda key, count: np.full(count, 0.5))
    assert off() > 0.35
