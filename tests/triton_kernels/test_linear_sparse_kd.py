"""linear_sparse_kd(implementation="triton") against float64, in Triton's interpreter; never run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import needs_triton, results

from ddk_pipe.pipeline.losses import linear_sparse_kd
from ddk_pipe.pipeline.targets import SparseTargets

BOUND = 2e-6  # float32, as for the path in torch


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_case_against_float64(softcap: float | None) -> None:
    everything = results(Path(__file__).with_name("linear_cases.py"))
    assert len(everything) == 16, everything.get("")
    found = {case: errors for case, errors in everything.items() if case.endswith(f"softcap={softcap}")}
    assert len(found) == 8
    over = {
        f"{case}: {name}": error
        for case, errors in found.items()
        for name, error in errors.items()
        if not error <= BOUND
    }
    assert not over


@pytest.mark.slow
@needs_triton
def test_first_use_finds_the_kernel_right_and_auto_takes_it() -> None:
    found = dict(results(Path(__file__).with_name("first_use_cases.py")))
    bounds = {"torch.float32": 2e-6, "torch.float16": 2e-3, "torch.bfloat16": 1.6e-2}
    for dtype, bound in bounds.items():
        assert dtype in found, found.get("")
        errors = found.pop(dtype)
        assert errors["chosen"] == "triton"
        assert errors["total"] <= bound
        assert errors["gradients"] <= bound
    assert len(found) == 9
    assert set(found.values()) == {None}


def call_on_the_cpu(**options: Any) -> None:
    """One position, two hidden units, four tokens."""
    targets = SparseTargets(
        ids=torch.tensor([[1]]).int(), logprobs=torch.zeros(1, 1), tail=torch.tensor([float("-inf")])
    )
    hidden, weight, labels = torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([1])
    linear_sparse_kd(hidden, weight, labels, targets, gamma=1.0, implementation="triton", **options)


def test_reverse_kl_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="forward KL only"):
        call_on_the_cpu(direction="reverse")


@needs_triton
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="logits on the CPU"):
        call_on_the_cpu()
