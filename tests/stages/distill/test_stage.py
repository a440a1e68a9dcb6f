"""`distill` as processes: two on one folder, and one that cannot be saved in time."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ranks import distill_command, finish, kill, start_ranks

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.metrics import last_row
from ddk_pipe.stages.common import alone
from ddk_pipe.stages.distill import distill

LONG = (
    "distill.steps=100000",
    "distill.interval_steps=100000",
    "distill.batch_tokens=64",
    "distill.validation_windows=1",
)


def wait_until(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the record shows that the run took this step."""
    end = time.monotonic() + 200
    while (last_row(run, "steps") or {"step": 0})["step"] < step:
        assert process.poll() is None and time.monotonic() < end, process.stdout and process.stdout.read()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_the_second_of_two_is_told(cached: Path, ranks: int | None) -> None:
    """By real processes; the system frees the folder of the first, which is killed."""
    first = start_ranks(distill_command(cached, *LONG), 1)
    run = cached.parent / "out" / "distill" / "student"
    try:
        wait_until(run, 1, first[0])
        second = start_ranks(distill_command(cached, *LONG), ranks)
        printed = [process.communicate(timeout=200)[0] for process in second]
        assert {process.returncode for process in second} == {2}
        told = [line for line in "".join(printed).splitlines() if line.startswith("ddk-pipe: ")]
        assert set(told) == {
            f"ddk-pipe: {run}: another process trains in this folder; wait for it, or set another distill.name"
        }
        assert first[0].poll() is None
    finally:
        kill(first)
    finish(start_ranks(distill_command(cached, "distill.name=student", "distill.steps=1"), ranks))


def test_another_process_in_the_folder(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_pipe.stages.common.locking.PATIENCE_SECONDS", 0.1)
    project = load_project(cached, ["distill.steps=1", "distill.validation_windows=1"])
    with (
        alone(project.run, what="is here", hint=""),
        pytest.raises(DdkError, match="another process trains in this"),
    ):
        distill(project)
    assert distill(project)["steps"] == 1
    with alone(project.run, what="is here", hint=""):  # nothing to do, so nothing to wait for
        assert distill(project)["steps"] == 1


@pytest.mark.slow
def test_a_run_that_cannot_be_saved_in_time_names_its_last_checkpoint(cached: Path, tmp_path: Path) -> None:
    """Saving hangs, as that of a large student on a slow disk may; before that one checkpoint was written."""
    hang = (
        "import sys, time\n"
        "from ddk_pipe.stages.distill.checkpoints import Checkpoints\n"
        "from ddk_pipe.stages.cli.program import main\n"
        "save = Checkpoints.save\n"
        "def slow(self, position):\n"
        "    save(self, position) if position['step'] <= 2 else time.sleep(600)\n"
        "Checkpoints.save = slow\n"
        "main()\n"
    )
    command = distill_command(
        cached, *LONG[:1], "distill.interval_steps=2", *LONG[2:], "distill.checkpoint_steps=2"
    )
    module = command.index("-m")
    command[module : module + 2] = ["-c", hang]
    process = subprocess.Popen(
        command,
        env={**os.environ, "DDK_PIPE_GRACE_SECONDS": "1.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = cached.parent / "out" / "distill" / "student"
    wait_until(run, 4, process)  # whose end is never saved
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=200)[0]
    last = printed.strip().splitlines()[-1]
    assert process.returncode == 143, printed
    assert re.fullmatch(
        r"ddk-pipe: not stopped within 1\.5 s \(DDK_PIPE_GRACE_SECONDS\), so ended; the same command goes on from"
        rf" {run}/checkpoints/step-00000002",
        last,
    ), printed


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", "1e9"])
def test_a_grace_that_is_no_time(cached: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDK_PIPE_GRACE_SECONDS", value)
    with pytest.raises(DdkError, match=f"DDK_PIPE_GRACE_SECONDS={value}: not a number of seconds above 0"):
        distill(load_project(cached, ["distill.steps=1", "distill.validation_windows=1"]))


def test_what_cannot_begin_leaves_nothing(cached: Path) -> None:
    shutil.rmtree(cached.parent / "out" / "cache")
    with pytest.raises(DdkError, match="no teacher cache"):
        distill(load_project(cached))
    assert not (cached.parent / "out" / "distill").exists()


def test_a_link_in_place_of_the_lock(cached: Path, tmp_path: Path) -> None:
    project = load_project(cached, ["distill.steps=1", "distill.validation_windows=1"])
    project.run.mkdir(parents=True)
    (project.run / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DdkError, match="lock: a link or a folder"):
        distill(project)
    assert not (tmp_path / "elsewhere").exists()
