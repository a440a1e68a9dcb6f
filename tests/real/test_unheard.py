"""What reaches the user of a real vLLM and of a real conversion: our own lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import MakeProject, make_model, make_tokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        # a socket's path has 107 characters at most: not in the test's folder
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_RPC_BASE_PATH": "/tmp",
            "TMPDIR": str(folder),
            **environment,
        },
    )


@pytest.mark.parametrize("own_process", ["0", "1"])
def test_vllm_prints_nothing(
    need_vllm: None, make_project: MakeProject, tmp_path: Path, own_process: str
) -> None:
    folder, logs = tmp_path / "model", tmp_path / "logs"
    logs.mkdir()
    make_model(folder, vocab_size=len(make_tokenizer(folder).get_vocab()), hidden_size=128)
    path = make_project(teacher={"model": str(folder), "backend": "vllm"})
    named = ("-m", "ddk_pipe.stages.cli", "cache-teacher", str(path), "--limit", "1")
    done = run(logs, *named, VLLM_ENABLE_V1_MULTIPROCESSING=own_process)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    others = [
        line for line in done.stderr.splitlines() if not line.startswith(("prepare ", "cache-teacher: "))
    ]
    assert others == []
    assert not list(logs.glob("ddk-pipe-*.log"))


def test_the_conversion_prints_nothing(smollm: Path, tmp_path: Path) -> None:
    """`smollm` has seen to it that there is something to convert."""
    code = "from pathlib import Path; from ddk_pipe.stages.demo.material import write_teacher; write_teacher(Path('t'))"
    done = run(tmp_path, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "t/model.safetensors").is_file()
