"""linear_sparse_kd(implementation="triton") against float64, in Triton's interpreter; never run on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_pipe.pipeline.losses import linear_sparse_kd
from ddk_pipe.pipeline.targets import SparseTargets

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
BOUND = 2e-6  # float32, as for the path in torch


@needs_triton
def test_every_case_against_float64() -> None:
    script = str(Path(__file__).with_name("linear_cases.py"))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    over = {
        f"{case}: {name}": error
        for case, errors in found.items()
        for name, error in errors.items()
        if not error <= BOUND
    }
    assert not over


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
