from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.targets import LEVELS, LOG_STEPS, Context, Plan, label_codes
from ddk_pipe.pipeline.targets import weights as weights_module
from ddk_pipe.pipeline.targets.quantisers import ONE, cell_of
from ddk_pipe.pipeline.targets.weights import WeightCodec


def plan(scheme: str, tau: float = 0.02, cap: int = 50) -> Plan:
    return Plan(scheme, tau, 8, cap, 50, (1.0,), 0)


def pps_codes(codec: WeightCodec, weights: list[float], mass: float, key: str) -> np.ndarray[Any, Any]:
    """Of one position without a label."""
    rows, context = np.zeros(len(weights), np.int64), replace(Context.none(1), key=key)
    return codec.pps_codes(np.array(weights), rows, np.zeros(1), np.array([mass]), context)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk"])
@given(weight=st.floats(0.0101, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_code_is_an_end_of_the_cell_around_the_weight(scheme: str, weight: float, seed: int) -> None:
    """The stated bound: within a cell under pps, within half of one elsewhere."""
    codec = WeightCodec(plan(scheme, tau=0.01, cap=100))
    if scheme == "pps":  # the second is the greatest, whose slot is the rest's
        codes = pps_codes(codec, [weight / 2, weight], 0.001, f"{seed}")
    else:
        codes = codec.codes(np.array([weight / 2, weight]))
    bound = codec.cell(weight / 2) * (1.0 if scheme == "pps" else 0.5) + 1e-12
    assert abs(codec._weights[codes[0]] - max(weight / 2, codec.lowest)) <= bound
    assert (codes[1] > LEVELS) == (scheme == "pps")
    assert codec.cell(weight) <= 4.2 / LEVELS * (1 - codec.lowest**0.25)


def test_rounding_to_the_nearest_would_be_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of no bias in test_codec.py can fail: without the random rounding the mean is off by much of a cell."""
    codec = WeightCodec(plan("pps"))
    weight = codec._weights[20] + 0.4 * codec.cell(codec._weights[20])

    def off() -> float:
        decoded = [codec._weights[pps_codes(codec, [weight, 0.5], 0.1, str(key))[0]] for key in range(1000)]
        return float(abs(np.mean(decoded) - weight) / codec.cell(weight))

    assert off() < 0.08
    monkeypatch.setattr(weights_module, "uniforms", lambda *_: np.full(1, 0.5))
    assert off() > 0.35


@given(
    tau=st.sampled_from([0.1, 0.02, 1e-3, 1e-4, 5e-5]),
    spread=st.floats(0, 4),
    seed=st.integers(0, 1000),
    label=st.sampled_from(["greatest", "first", "none"]),
)
@settings(max_examples=80, deadline=None)
def test_what_is_left_for_the_greatest_is_positive(tau: float, spread: float, seed: int, label: str) -> None:
    """However many weights near tau are rounded: it errs by less than the widest cell and 1/2048 of a label."""
    codec, rng = WeightCodec(plan("pps", tau=tau)), np.random.default_rng(seed)
    weights = tau * np.exp(np.abs(rng.standard_normal(200)) * spread)
    weights = weights[np.cumsum(weights) < 1] if weights[0] < 1 else np.ones(1)
    mass = max(1 - weights.sum(), 0.0)
    at = {"greatest": int(weights.argmax()), "first": 0, "none": -1}[label]
    context = replace(Context.none(1), key=str(seed))
    label_weight = np.zeros(1)
    if at >= 0:
        code = label_codes(np.log(weights[at : at + 1]), 0, str(seed))
        context = replace(context, labels=np.array([at]), label_codes=code)
        if codec.implied(context)[0]:
            label_weight[0], weights = weights[at], np.delete(weights, at)
    rows = np.zeros(len(weights), np.int64)
    codes = codec.pps_codes(weights, rows, label_weight, np.array([mass]), context)
    shares = codec.split(codes, rows, context)
    widths = [codec.cell(weight) for weight in np.sort(weights)[: len(weights) - int(shares.coded[0])]]
    greatest, left = mass, shares.mass[0]
    if shares.coded[0] or shares.label[0]:
        greatest, left = label_weight[0] if shares.label[0] else weights.max(), shares.left[0]
        widths.append(float(np.diff(codec._masses)[cell_of(codec._masses, np.array([mass]))[0][0]]))
    by_code = 0.0 if shares.label[0] else 1.001 * label_weight[0] / LOG_STEPS
    assert left > 0
    assert abs(left / ONE - greatest) <= max(widths, default=0.0) + by_code + 1e-9
