"""Running what needs Triton's interpreter, or Triton without it: each in a fresh process.

TRITON_INTERPRET counts when triton is imported, and only then, and rules out compiling in the same process.
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
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)


def run_python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    """`python -P ARGUMENTS` with this folder on its path, in the interpreter or surely without it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def cases_in(folder: Path) -> list[Any]:
    """(file, name) of every case in the files of a folder, to parametrise with: no triton is imported.

    Where tests run side by side, those of one file stay in one process, for it is run once in each.
    """
    return [
        pytest.param(script, name, id=f"{script.stem}-{name}", marks=pytest.mark.xdist_group(str(script)))
        for script in sorted(folder.glob("*.py"))
        for name in _load(script).CASES
    ]


def _load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def results(script: Path) -> dict[str, Any]:
    """What a file of cases prints, run once in the interpreter; also once if it fails."""
    done = run_python("-X", "faulthandler", str(script), interpret=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"": done.stderr}


def assert_within_bounds(script: Path, name: str) -> None:
    """Fails with what is wrong unless every finding of that case keeps its bound, and there is one."""
    found = results(script)
    assert name in found, found.get("", "no such case")
    findings = found[name]
    assert not isinstance(findings, str), findings
    assert findings, "the case checks nothing"
    over = [f"{what}: {error:.2g}, bound {bound:g}" for what, error, bound in findings if not error <= bound]
    assert not over, over
