"""The command line as Markdown, for the docs: `python -P -m ddk_pipe.stages.cli.reference > docs/cli.md`."""

from __future__ import annotations

import os

from typer.testing import CliRunner

from ddk_pipe.stages.cli.program import app

WIDTH = "110"  # columns


def reference() -> str:
    """What `--help` says, of the program and of every command."""
    commands = [
        (command.name or command.callback.__name__) for command in app.registered_commands if command.callback
    ]
    parts = ["# Commands", "What `--help` says.", _help([])]
    for name in commands:
        parts += [f"## `ddk-pipe {name}`", _help([name])]
    return "\n\n".join(parts) + "\n"


def _help(arguments: list[str]) -> str:
    done = CliRunner().invoke(
        app, [*arguments, "--help"], prog_name="ddk-pipe", env={**os.environ, "COLUMNS": WIDTH}
    )
    return f"```text\n{done.output.strip()}\n```"


if __name__ == "__main__":
    print(reference(), end="")
