"""Output of this process's own descriptors, hence run in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

NOISE = """
import os, sys, subprocess, warnings, threading
from pathlib import Path
from ddk_pipe.stages.common import Unheard, say, track

unheard = Unheard()
say("before")
try:
    with unheard.listening():
        print("noise on standard output")
        warnings.warn("noise in a warning", FutureWarning)
        os.write(2, b"noise of a library in C\\n")
        subprocess.run([sys.executable, "-c", "print('noise of a child')"])
        later = subprocess.Popen([sys.executable, "-c", "input(); print('noise of a child that stays')"], stdin=-1)
        say("ours, meanwhile")
        if MODE == "fails":
            raise RuntimeError("why")
except RuntimeError:
    print(f"kept: {unheard.keep()}")
later.communicate(b"go\\n")
say("after")
print("result")
print(unheard.path, file=open("where", "w"))
warnings.warn("heard again")
"""
SAID = [
    "noise on standard output",
    "noise of a library in C",
    "noise of a child",
    "noise of a child that stays",
]


def run(folder: Path, mode: str) -> tuple[str, str, Path]:
    code = NOISE.replace("MODE", repr(mode))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, Path((folder / "where").read_text().strip())


def test_only_our_lines_are_seen_and_no_file_is_left(tmp_path: Path) -> None:
    out, err, log = run(tmp_path, "goes well")
    assert out == "result\n"
    assert [line for line in err.splitlines() if "warn" not in line.lower()] == [
        "before",
        "ours, meanwhile",
        "after",
    ]
    assert "heard again" in err and not log.exists()


def test_what_was_said_is_there_where_something_fails(tmp_path: Path) -> None:
    out, err, log = run(tmp_path, "fails")
    try:
        assert out == f"kept: {log}\nresult\n" and "noise" not in err
        assert log.read_text().splitlines() == SAID
    finally:
        log.unlink()


def test_nothing_said_is_nothing_to_keep() -> None:
    from ddk_pipe.stages.common import Unheard

    unheard = Unheard()
    assert unheard.keep() is None
    path = unheard.path
    del unheard
    assert not path.exists()


def test_streams_without_a_descriptor(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a notebook: our lines go to its stream, what is printed does not."""
    from ddk_pipe.stages.common import Unheard, console, say

    unheard = Unheard()
    with unheard.listening():
        print("noise")
        say("ours")
    say("after")
    assert capsys.readouterr() == ("", "ours\nafter\n")
    assert unheard.path.read_text() == "noise\n"
    assert console.file is not None
