"""The commands that look at what is there: inspect, verify, report. Heavy imports stand inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddk_pipe.stages.cli.arguments import prepare_machine


def inspect(
    place: Annotated[str, typer.Argument(help="a folder that ddk-pipe wrote, or the URL of a cache")],
) -> None:
    """Say what a tokens, cache, run or output folder holds, in one screen.

    \b
    Example:
      ddk-pipe inspect out/cache
      ddk-pipe inspect s3://bucket/cache
    """
    from ddk_pipe.stages.inspect import inspect as run

    run(place)


def verify(
    place: Annotated[str, typer.Argument(help="a cache (folder or URL), an output folder, or a manifest")],
    repair: Annotated[
        bool, typer.Option("--repair", help="remove what is bad, so that cache-teacher makes it again")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Check every byte of a cache: digests, windows, statistics, and that no shard is missing.

    Exit status 0: sound and complete; 1: something is wrong or missing; 2: no cache to look at.

    --repair removes damaged shards (record first), a damaged rank table with the shards that need it, and what
    killed writers left more than an hour ago. It never removes anything sound, nor a file it does not know.

    \b
    Example:
      ddk-pipe verify out/cache
      ddk-pipe verify s3://bucket/cache --repair; ddk-pipe cache-teacher
    """
    prepare_machine()
    from ddk_pipe.stages.inspect import verify as run

    if not run(place, repair=repair, as_json=as_json).sound:
        raise typer.Exit(1)


def report(
    place: Annotated[Path, typer.Argument(help="the folder of a run or of a sweep, or the sweep file")],
    kind: Annotated[
        str, typer.Option("--format", help="html, or png or svg: every picture as a file")
    ] = "html",
    out: Annotated[
        Path | None, typer.Option(help="the page, or the folder of the pictures; in PLACE if left out")
    ] = None,
) -> None:
    """Show a run or a sweep: text here, and one self-contained HTML page. Also while it is unfinished.

    \b
    Example:
      ddk-pipe report out/distill/student
      ddk-pipe report sweep.yaml
      ddk-pipe report out/sweeps/sweep --format png --out pictures
    """
    from ddk_pipe.stages.report import report as run

    run(place, kind=kind, out=out)
