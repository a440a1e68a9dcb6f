"""A line that every process would say: said once, and by somebody whatever becomes of the one that was to say it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.cli.mistakes import friendly
from ddk_pipe.stages.distill import said
from ddk_pipe.stages.distill.said import meet, say_once

LINE = "ddk-pipe: the loss is nan; look at it"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """In torchrun's place: the agent's store, where the environment says it is. No run has met yet."""
    opened = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(said, "_meeting", [])
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(opened.port))
    yield opened


def heard(*lines: str) -> list[str]:
    """What is said where processes, one after the other, would say these lines."""
    out: list[str] = []
    for line in lines:
        say_once(line, out.append)
    return out


def test_the_same_line_once_others_too() -> None:
    assert heard(LINE, LINE, "another", LINE) == [LINE, "another"]


def test_a_run_is_not_silenced_by_what_an_earlier_one_said() -> None:
    """The store is the same for all of torchrun's life: elastic restarts and commands in the same processes."""
    meet("first")
    assert heard(LINE) == [LINE]
    meet("second")
    assert heard(LINE, LINE) == [LINE]


class Killed(BaseException):
    """As SIGKILL: nothing of ours runs after it."""


def die(_: str) -> None:
    raise Killed


def test_who_asked_first_died_before_its_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(said, "ASK_SECONDS", 0.2)
    with pytest.raises(Killed):
        say_once(LINE, die)
    assert heard(LINE, LINE) == [LINE], "the second says it, the third hears of that"


def test_torchrun_stops_the_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is long, and SIGTERM comes in it: the line is said at once, and the process is still its own master."""
    monkeypatch.setattr(said, "ASK_SECONDS", 600.0)
    monkeypatch.setattr("ddk_pipe.stages.common.stopping._leave_after", lambda *_: None)
    with pytest.raises(Killed):
        say_once(LINE, die)
    real, asked = TCPStore.check, list[Any]()

    def check(self: TCPStore, keys: list[str]) -> bool:
        asked.append(keys)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return bool(real(self, keys))

    monkeypatch.setattr(TCPStore, "check", check)
    assert heard(LINE) == [LINE] and len(asked) == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_store_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(said, "ASK_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        assert heard(LINE, LINE) == [LINE, LINE]


@pytest.mark.parametrize("call", ["add", "check", "set"])
def test_a_store_that_answers_late(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts who asks, and its answer comes when nobody listens any more: twice said, at worst."""
    real = getattr(TCPStore, call)

    def late(*arguments: Any) -> Any:
        real(*arguments)
        raise RuntimeError("wait timeout after 5000ms")  # torch's words

    monkeypatch.setattr(TCPStore, call, late)
    assert heard(LINE, LINE) in ([LINE], [LINE, LINE])


def test_without_torchrun_everybody_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert heard(LINE, LINE) == [LINE, LINE]


@pytest.mark.slow
def test_under_torchrun_the_speaker_is_killed_before_its_first_word() -> None:
    """torchrun hears of the death and sends SIGTERM to the other, which is waiting."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "--no-python", sys.executable, "-P", __file__],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.stderr.count(LINE) == 1, done.stderr
    assert "rank 0 speaks" in done.stderr and done.returncode != 0


@friendly
def fail() -> None:
    """The command that ends alike on both ranks."""
    raise DdkError("the loss is nan", hint="look at it")


def speak_and_die() -> None:
    """Rank 0: asks first, and is killed when rank 1 waits for it, before typer has printed a letter."""
    import typer

    def echo(*_: Any, **__: Any) -> None:
        store = said._open_store()
        while store.add(KEY, 0) < 2:
            time.sleep(0.05)
        print("rank 0 speaks", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    typer.echo = echo
    fail()


def ask_second() -> None:
    """Rank 1: asks once rank 0 has."""
    said._open_store().wait([KEY])
    fail()


if __name__ == "__main__":
    said.ASK_SECONDS = 60.0
    KEY = f"ddk_pipe/said/{said._this_run()}/{durable.digest(LINE.encode())}"
    speak_and_die() if os.environ["RANK"] == "0" else ask_second()
