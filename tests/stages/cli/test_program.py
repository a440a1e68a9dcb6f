"""The program and its help."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ddk_pipe.stages.cli import app

COMMANDS = (
    *("init", "schema", "prepare", "cache-teacher", "distill", "sweep", "report", "evaluate", "export"),
    *("estimate", "inspect", "verify", "demo"),
)
runner = CliRunner()


def test_help_is_light() -> None:
    """Within 0.5 s of CPU in a fresh process (the best of three), and without torch."""
    code = (
        "import sys; from typer.testing import CliRunner; from ddk_pipe.stages.cli import app;"
        "out = CliRunner().invoke(app, ['--help']); assert out.exit_code == 0, out.output;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print('light')"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout == "light\n"
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output and f"ddk-pipe {command}" in result.output


def test_schema_lists_every_field() -> None:
    output = runner.invoke(app, ["schema"]).output
    for name in (
        "cache.tau: float",
        "distill.optimizer.learning_rate",
        "domains.<name>.train",
        "teacher.vllm.capture",
    ):
        assert name in output
