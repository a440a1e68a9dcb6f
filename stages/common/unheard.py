"""What other people's engines print between our own lines: to a file, which is kept only where something fails."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ddk_pipe.stages.common.progress import console


class Unheard:
    """A log that is gone with this object, unless somebody asks to keep it."""

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="ddk-pipe-", suffix=".log")
        self.path = Path(name)
        self._log = open(handle, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
        # not at exit: logging handlers that were made inside hold on to the stream
        weakref.finalize(self, self._log.close).atexit = False
        self._gone = weakref.finalize(self, self.path.unlink, missing_ok=True)

    def keep(self) -> Path | None:
        """Where it stays from now on; None where nothing was said."""
        if not self.path.exists() or not self.path.stat().st_size:
            return None
        self._gone.detach()
        return self.path

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, what this process and those that it starts print goes to the log, but for `say` and `track`.

        Processes started inside print there as long as they live. Other threads of this one must not print meanwhile.
        """
        with ExitStack() as back:
            back.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _keep_console(back)
            for number in (1, 2):
                _turn_aside(number, self._log.fileno(), back)
            back.enter_context(redirect_stdout(self._log))
            back.enter_context(redirect_stderr(self._log))
            yield


def _keep_console(back: ExitStack) -> None:
    """Our own lines go where they went, also where that is descriptor 2 of this process."""
    ours: Any = console.file
    with suppress(OSError, ValueError, AttributeError):  # a stream of a notebook or a test has no descriptor
        if ours.fileno() == 2:
            ours = os.fdopen(os.dup(2), "w", buffering=1, encoding=ours.encoding, errors=ours.errors)
            back.callback(ours.close)
    console.file = ours
    back.callback(setattr, console, "file", None)  # rich: whatever standard error is


def _turn_aside(number: int, to: int, back: ExitStack) -> None:
    """Descriptor `number` becomes a copy of `to` until the end; one that is closed stays so."""
    with suppress(OSError):
        before = os.dup(number)
        back.callback(os.close, before)
        back.callback(os.dup2, before, number)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(to, number)
