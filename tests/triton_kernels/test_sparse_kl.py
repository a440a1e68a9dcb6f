"""The row kernel against float64, in Triton's interpreter: one test a case of sparse_kl_cases/.

No GPU is used, and the kernel has not run on one. DDK_TEST_SEED=n draws other inputs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import assert_within_bounds, cases_in, needs_triton, run_python

pytestmark = needs_triton


@pytest.mark.parametrize(("script", "name"), cases_in(Path(__file__).with_name("sparse_kl_cases")))
def test_against_float64(script: Path, name: str) -> None:
    assert_within_bounds(script, name)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    program = """
import torch
from ddk_pipe.triton_kernels.sparse_kl import sparse_kl
z, i = torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int32)
try:
    sparse_kl(z, torch.zeros(2, dtype=torch.int64), i, torch.zeros(2, 1), torch.full((2,), -torch.inf), gamma=1.0)
except ValueError as error:
    print(error)
"""
    done = run_python("-c", program, interpret=False)
    assert "TRITON_INTERPRET" in done.stdout, done.stderr


def test_the_package_itself_imports_neither_triton_nor_torch() -> None:
    program = "import sys, ddk_pipe.triton_kernels; print({'torch', 'triton'} & set(sys.modules))"
    assert run_python("-c", program, interpret=False).stdout.strip() == "set()"
