"""`ddk-pipe distill` as other processes: one, or the ranks of a run, without torchrun's own start-up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 200  # for all of them; about 10 where nothing else runs


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_ranks(command: list[str], ranks: int | None) -> list[subprocess.Popen[str]]:
    """`command` as so many ranks of one world (None: as no world at all)."""
    port = free_port()
    started = []
    for rank in range(ranks or 1):
        world = (
            {} if ranks is None else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        )
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks else {}
        started.append(
            subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", **world, **meeting},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes: list[subprocess.Popen[str]]) -> str:
    """Wait for all; returns what they printed. Raises AssertionError with it if one failed."""
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        kill(processes)
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)
    return "\n".join(printed)


def kill(processes: list[subprocess.Popen[str]]) -> None:
    """kill -9, and gone on return."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()
        if process.stdout:
            process.stdout.close()


def kill_when(processes: list[subprocess.Popen[str]], condition: Callable[[], bool]) -> None:
    """kill -9 to all as soon as the condition holds; AssertionError if one ends before."""
    end = time.monotonic() + SECONDS
    try:
        while not condition():
            for process in processes:
                assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < end, "nothing happened in time"
            time.sleep(0.005)
    finally:
        kill(processes)


def distill_command(manifest: Path, *sets: str) -> list[str]:
    """The command line of `ddk-pipe distill`."""
    command = [sys.executable, "-P", "-m", "ddk_pipe.stages.cli", "distill", str(manifest)]
    for value in sets:
        command += ["--set", value]
    return command
