"""The scripts in examples/, as a user runs them, and the names they rest on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import ddk_pipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "hf_trainer"])
def test_example(name: str, cached_output: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 60
    command = [
        sys.executable,
        str(script),
        str(cached_output / "cache"),
        str(tiny_teacher),
        str(tmp_path / "new"),
        "20",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(gap|loss) -?\d+\.\d+", done.stdout)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "new").model.norm.weight
    before = AutoModelForCausalLM.from_pretrained(tiny_teacher).model.norm.weight
    assert not after.equal(before)


def test_public_names() -> None:
    """Each is there, documented, and listed in the docs; `import ddk_pipe` brings no torch."""
    page = (EXAMPLES.parent / "docs" / "python-api.md").read_text()
    for name in ddk_pipe.__all__:
        value = getattr(ddk_pipe, name)
        assert f"`{name}`" in page and (value.__doc__ or name == "RULES"), name
        assert name in dir(ddk_pipe)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ddk_pipe.nothing
    code = "import sys, ddk_pipe; assert 'torch' not in sys.modules and ddk_pipe.__version__"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
