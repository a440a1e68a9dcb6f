"""The program and its commands, in the order of its help; their files import nothing heavy, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from ddk_pipe.stages.cli import caches, looking, starting, students
from ddk_pipe.stages.cli.mistakes import friendly

COMMANDS: dict[str, Callable[..., None]] = {
    "init": starting.init,
    "schema": starting.schema,
    "prepare": caches.prepare,
    "cache-teacher": caches.cache_teacher,
    "distill": students.distill,
    "sweep": students.sweep,
    "report": looking.report,
    "evaluate": students.evaluate,
    "export": students.export,
    "inspect": looking.inspect,
    "estimate": caches.estimate,
    "verify": looking.verify,
    "demo": starting.demo,
}

app = typer.Typer(
    name="ddk-pipe",
    help="Pay for the teacher once, then distil any number of students from its cached predictions.\n\n"
    "\b\nThe way of data:  prepare -> cache-teacher -> distill\n"
    "A first look:     ddk-pipe demo\n"
    "Your own files:   ddk-pipe init, edit manifest.yaml, then the three above",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import ddk_pipe

        typer.echo(f"ddk-pipe {ddk_pipe.__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options of the program itself; the commands follow."""


for _name, _command in COMMANDS.items():
    app.command(_name)(friendly(_command))


def main() -> None:
    """Entry point of the console script."""
    app()
