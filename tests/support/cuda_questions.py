"""Who asked for a GPU, and with which variables set: programs under the stand-ins of the folder cuda_asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ddk_pipe.stages.common.machine import BEFORE_CUDA

STAND_INS = Path(__file__).parent / "cuda_asked"


@dataclass(frozen=True)
class Noted:
    """One question for a GPU, or `engine`: vLLM's is about to begin."""

    event: str
    process: int
    touched: bool  # the process, or the one it was forked from, has brought CUDA up
    variables: dict[str, str | None]  # of BEFORE_CUDA, as they were


def environment(notes: Path) -> dict[str, str]:
    """This process's environment without our variables; whatever starts in it notes its questions there."""
    inherited = {name: value for name, value in os.environ.items() if name not in BEFORE_CUDA}
    path = os.pathsep.join(filter(None, [str(STAND_INS), inherited.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "DDK_NOTE_CUDA": str(notes), "PYTHONSAFEPATH": "1"}


def run(*arguments: object, notes: Path, **changes: str) -> tuple[list[Noted], str]:
    """`ddk-pipe ...` there; what was noted, and what it said."""
    ended = subprocess.run(
        [sys.executable, "-m", "ddk_pipe.stages.cli", *map(str, arguments)],
        env={**environment(notes), **changes},
        capture_output=True,
        text=True,
        check=False,  # the stand-in refuses
    )
    return noted_in(notes), ended.stderr


def noted_in(notes: Path) -> list[Noted]:
    """In order."""
    lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    return [
        Noted(line["event"], line["process"], line["touched"], {name: line[name] for name in BEFORE_CUDA})
        for line in lines
    ]
