"""The never-materialise kernels against float64, in Triton's interpreter: one test a case of fused_cases.py.

No GPU is used, and the kernels have not run on one. DDK_TEST_SEED=n draws other inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)

HELPER = Path(__file__).with_name("fused_cases.py")


def load_helper() -> ModuleType:
    """For the names of the cases; importing it needs no triton."""
    spec = importlib.util.spec_from_file_location("fused_cases", HELPER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    """A fresh process: TRITON_INTERPRET counts when triton is imported, and only then."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@functools.cache
def helper_run() -> subprocess.CompletedProcess[str]:
    """All cases, run once, also when that fails: about fifteen seconds."""
    return run_python("-X", "faulthandler", str(HELPER), interpret=True)


@pytest.mark.parametrize("name", load_helper().CASES)
def test_against_float64(name: str) -> None:
    done = helper_run()
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)[name]
    assert not isinstance(findings, str), findings
    assert findings, "the case checks nothing"
    over = [f"{what}: {error:.2g}, bound {bound:g}" for what, error, bound in findings if not error <= bound]
    assert not over, over


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
