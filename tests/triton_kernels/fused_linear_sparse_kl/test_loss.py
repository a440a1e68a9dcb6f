"""The never-materialise kernels against float64, in Triton's interpreter: one test a case of cases/.

No GPU is used, and the kernels have not run on one. DDK_TEST_SEED=n draws other inputs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import assert_within_bounds, cases_in, needs_triton, run_python

pytestmark = needs_triton


@pytest.mark.parametrize(("script", "name"), cases_in(Path(__file__).with_name("cases")))
def test_against_float64(script: Path, name: str) -> None:
    assert_within_bounds(script, name)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    program = """
import torch
from ddk_pipe.triton_kernels.fused_linear_sparse_kl import fused_linear_sparse_kl
h, w, y = torch.zeros(2, 16), torch.zeros(5, 16), torch.zeros(2, dtype=torch.int64)
i = torch.zeros(2, 1, dtype=torch.int32)
try:
    fused_linear_sparse_kl(h, w, y, i, torch.zeros(2, 1), torch.full((2,), -torch.inf), gamma=1.0)
except ValueError as error:
    print(error)
"""
    done = run_python("-c", program, interpret=False)
    assert "TRITON_INTERPRET" in done.stdout, done.stderr
