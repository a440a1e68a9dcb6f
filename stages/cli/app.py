"""The command line. Heavy imports stand inside the commands: `ddk-pipe --help` imports no torch."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.cli import students as cli_students

P = ParamSpec("P")

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

ManifestArgument = Annotated[Path, typer.Argument(help="the manifest (YAML)")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="change one field for this call, e.g. --set distill.steps=50; may be repeated"
    ),
]
DEFAULT_MANIFEST = Path("manifest.yaml")


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
    line = f"ddk-pipe: {' '.join(text.split())}"
    if _is_news(line):
        typer.echo(line, err=True)
    raise typer.Exit(status)


def _is_news(line: str) -> bool:
    """False if another process of this run (torchrun) has told the user the very same."""
    if "RANK" not in os.environ:
        return True
    from ddk_pipe.stages.distill import first_to_say

    return first_to_say(line)


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


@app.command()
@friendly
def init(path: ManifestArgument = DEFAULT_MANIFEST) -> None:
    """Write a commented starter manifest for your own files.

    \b
    Example:
      ddk-pipe init            # writes manifest.yaml
      ddk-pipe schema          # every field there is
    """
    from ddk_pipe.pipeline.manifest import STARTER
    from ddk_pipe.pipeline.storage import durable

    if path.exists():
        raise DdkError(f"{path}: exists already", hint="choose another name")
    durable.write_file(path.absolute(), STARTER.encode())
    typer.echo(
        f"wrote {path}: name your files and your teacher there, then run `ddk-pipe cache-teacher {path}`"
    )


@app.command()
@friendly
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="as a Markdown table, for the docs")] = False,
) -> None:
    """Print every field of the manifest: type, default, meaning.

    \b
    Example:
      ddk-pipe schema | grep cache
    """
    from ddk_pipe.pipeline.manifest import reference

    if markdown:
        typer.echo("# The manifest\n\n| field | type | default | meaning |\n|---|---|---|---|")
    for name, kind, default, meaning in reference():
        if markdown:
            cells = (f"`{name}`", kind.replace("|", "or"), default.replace("None", "null"), meaning)
            typer.echo(f"| {' | '.join(cells)} |")
        else:
            typer.echo(f"{name}: {kind}{f' = {default}' if default else ''}\n    {meaning}")


@app.command()
@friendly
def prepare(manifest: ManifestArgument = DEFAULT_MANIFEST, overrides: Overrides = None) -> None:
    """Tokenise the domains' text and pack it into windows. Skipped where nothing changed.

    \b
    Example:
      ddk-pipe prepare manifest.yaml --set seq_len=512
    """
    project = _project(manifest, overrides)
    from ddk_pipe.stages.prepare import prepare as run

    run(project)


@app.command("cache-teacher")
@friendly
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
    project = _project(manifest, overrides)
    from ddk_pipe.stages.cache_teacher import Request
    from ddk_pipe.stages.cache_teacher import cache_teacher as run

    names = tuple(name.strip() for name in domains.split(",") if name.strip())
    run(project, Request(limit, names, dry_run, status, engine, workers))


@app.command()
@friendly
def distill(
    manifest: ManifestArgument = DEFAULT_MANIFEST,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the manifest and say what would be done; loads nothing")
    ] = False,
) -> None:
    """Train a student from the cache; the teacher is not needed any more. Continues where it stopped.

    \b
    Example:
      ddk-pipe distill manifest.yaml
      ddk-pipe distill manifest.yaml --dry-run
      torchrun --nproc-per-node 8 --no-python ddk-pipe distill manifest.yaml --set distill.parallel=fsdp
      ddk-pipe distill manifest.yaml --set distill.name=uniform --set distill.mixing=uniform
    """
    if dry_run:
        from ddk_pipe.pipeline.manifest import load_project
        from ddk_pipe.stages.cli.dry_run import describe

        for line in describe(load_project(manifest, overrides)):
            typer.echo(f"distill: {line}")
        return
    project = _project(manifest, overrides)
    from ddk_pipe.stages.distill import distill as run

    run(project)


for _name, _command in cli_students.COMMANDS.items():
    app.command(_name)(friendly(_command))


@app.command()
@friendly
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


@app.command()
@friendly
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
    project = _project(manifest, overrides)
    from ddk_pipe.stages.cache_teacher import estimate as run

    run(project, windows=windows, as_json=as_json)


@app.command()
@friendly
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
    _prepare_machine()
    from ddk_pipe.stages.inspect import verify as run

    if not run(place, repair=repair, as_json=as_json).sound:
        raise typer.Exit(1)


@app.command()
@friendly
def demo(
    folder: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/demo"),
    material: Annotated[
        bool, typer.Option("--material", help="write its text and its teacher only; seconds")
    ] = False,
) -> None:
    """Run the whole pipeline on real text with a real teacher (SmolLM2-135M), in about ten minutes.

    \b
    Example:
      ddk-pipe demo
      ddk-pipe inspect runs/demo
      ddk-pipe demo --material      # a teacher to try your own text with: runs/demo/teacher
    """
    _prepare_machine()
    from ddk_pipe.stages.demo import demo as run

    run(folder, material=material)


def _project(manifest: Path, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    """The checked project; everything wrong with the manifest is said before anything heavy is imported."""
    from ddk_pipe.pipeline.manifest import load_project

    project = load_project(manifest, overrides)
    _prepare_machine()
    return project


def _prepare_machine() -> None:
    from ddk_pipe.stages.common import prepare_cpu

    prepare_cpu()


def main() -> None:
    """Entry point of the console script."""
    app()
