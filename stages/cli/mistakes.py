"""What a command that cannot go on says: one line, and an exit status."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from ddk_pipe.pipeline.errors import DdkError

P = ParamSpec("P")


def friendly(command: Callable[P, None]) -> Callable[P, None]:
    """A user's mistake becomes one line and exit status 2.

    Ctrl-C and SIGTERM say how to continue, statuses 130 and 143.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from ddk_pipe.pipeline.storage import durable

        try:
            command(*args, **kwargs)
        except DdkError as mistake:
            _stop(str(mistake), 2)
        except KeyboardInterrupt as stop:
            terminated = type(stop) is not KeyboardInterrupt  # by SIGTERM (ddk_pipe.stages.common.stopping)
            again = f"run the same command again to continue: {shlex.join(['ddk-pipe', *sys.argv[1:]])}"
            how = "terminated" if terminated else "interrupted"
            _stop(f"{how}; what is finished is kept, {again}", 143 if terminated else 130)
        except OSError as problem:
            mistake_or_none = durable.explain(problem)
            if mistake_or_none is None:
                raise
            _stop(str(mistake_or_none), 2)

    return wrapped


def _stop(text: str, status: int) -> None:
    shown = (
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split())
    )
    _say(f"ddk-pipe: {''.join(shown)}")  # what a file holds is no order to the terminal
    raise typer.Exit(status)


def _say(line: str) -> None:
    """On stderr; once where every process of this run (torchrun) would say the very same."""
    say = functools.partial(typer.echo, err=True)
    if "RANK" not in os.environ:
        say(line)
        return
    from ddk_pipe.stages.distill import say_once

    say_once(line, say)
