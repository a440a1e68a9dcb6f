"""The commands that end in a cache: prepare, estimate, cache-teacher. Heavy imports stand inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddk_pipe.stages.cli.arguments import DEFAULT_MANIFEST, ManifestArgument, Overrides, checked_project


def prepare(
    manifest: ManifestArgument = DEFAULT_MANIFEST,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help="local, or ray (RAY_ADDRESS names the cluster)")] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="parts tokenised at once; ray: as many as there are CPUs if left out"),
    ] = None,
) -> None:
    """Tokenise the domains' text and pack it into windows. Skipped where nothing changed, continues where it stopped.

    \b
    Example:
      ddk-pipe prepare manifest.yaml --set seq_len=512
      ddk-pipe prepare manifest.yaml --workers 8
    """
    project = checked_project(manifest, overrides)
    from ddk_pipe.stages.prepare import prepare as run

    run(project, engine=engine, workers=workers)


def estimate(
    manifest: ManifestArgument = DEFAULT_MANIFEST,
    overrides: Overrides = None,
    windows: Annotated[
        int | None, typer.Option(help="windows of each domain to look at; about 4k tokens if left out")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Run the teacher on a small sample and say what caches at several settings would cost.

    Prints bytes and entries per position, the size of the cache, the teacher's time, and how much noise the draws
    add to the gradient, relative to a label drawn from the teacher. Recommends one setting.

    \b
    Example:
      ddk-pipe estimate manifest.yaml
      ddk-pipe estimate manifest.yaml --windows 16 --json
    """
    project = checked_project(manifest, overrides)
    from ddk_pipe.stages.cache_teacher import estimate as run

    run(project, windows=windows, as_json=as_json)


def cache_teacher(
    manifest: ManifestArgument = DEFAULT_MANIFEST,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(help="make at most so many shards")] = None,
    domains: Annotated[str, typer.Option(help="only these, separated by commas")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done; no teacher is loaded")
    ] = False,
    status: Annotated[
        Path | None, typer.Option(help="append a JSON object per shard and event to this file")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray (RAY_ADDRESS names the cluster)")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="teachers at once; ray: as many as there is room for if left out")
    ] = None,
) -> None:
    """Run the teacher once over all windows and keep what students need. Continues where it stopped.

    Prepares the text first if need be. SIGTERM and Ctrl-C keep what is finished.

    \b
    Example:
      ddk-pipe cache-teacher manifest.yaml --set cache.tau=0.01
      ddk-pipe cache-teacher manifest.yaml --dry-run
      ddk-pipe cache-teacher manifest.yaml --domains code,plays --limit 100 --status status.jsonl
      ddk-pipe cache-teacher manifest.yaml --engine ray --workers 8
    """
    project = checked_project(manifest, overrides)
    from ddk_pipe.stages.cache_teacher import Request
    from ddk_pipe.stages.cache_teacher import cache_teacher as run

    names = tuple(name.strip() for name in domains.split(",") if name.strip())
    run(project, Request(limit, names, dry_run, status, engine, workers))
