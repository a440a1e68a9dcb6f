"""The command line. Heavy imports stand inside the commands: `ddk-pipe --help` imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from ddk_pipe.pipeline.errors import DdkError

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
    """A user's mistake becomes one line and exit status 2; Ctrl-C says that nothing is lost, status 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from ddk_pipe.pipeline import durable

        try:
            command(*args, **kwargs)
        except DdkError as mistake:
            _stop(str(mistake), 2)
        except KeyboardInterrupt:
            _stop("interrupted; what is finished is kept, run the same command again to continue", 130)
        except OSError as problem:
            mistake_or_none = durable.explain(problem)
            if mistake_or_none is None:
                raise
            _stop(str(mistake_or_none), 2)

    return wrapped


def _stop(text: str, status: int) -> None:
    typer.echo(f"ddk-pipe: {' '.join(text.split())}", err=True)
    raise typer.Exit(status)


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
    from ddk_pipe.pipeline import durable, manifest

    if path.exists():
        raise DdkError(f"{path}: exists already", hint="choose another name")
    durable.write_file(path.absolute(), manifest.STARTER.encode())
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
    from ddk_pipe.pipeline import manifest

    if markdown:
        typer.echo("# The manifest\n\n| field | type | default | meaning |\n|---|---|---|---|")
    for name, kind, default, meaning in manifest.reference():
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
def cache_teacher(manifest: ManifestArgument = DEFAULT_MANIFEST, overrides: Overrides = None) -> None:
    """Run the teacher once over all windows and keep what students need. Continues where it stopped.

    Prepares the text first if need be.

    \b
    Example:
      ddk-pipe cache-teacher manifest.yaml --set cache.tau=0.01
    """
    project = _project(manifest, overrides)
    from ddk_pipe.stages.cache_teacher import cache_teacher as run

    run(project)


@app.command()
@friendly
def distill(manifest: ManifestArgument = DEFAULT_MANIFEST, overrides: Overrides = None) -> None:
    """Train a student from the cache; the teacher is not needed any more. Continues where it stopped.

    \b
    Example:
      ddk-pipe distill manifest.yaml
      ddk-pipe distill manifest.yaml --set distill.name=uniform --set distill.mixing=uniform
    """
    project = _project(manifest, overrides)
    from ddk_pipe.stages.distill import distill as run

    run(project)


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
def demo(
    folder: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/demo"),
) -> None:
    """Run the whole pipeline on real text with a real teacher (SmolLM2-135M), in about ten minutes.

    \b
    Example:
      ddk-pipe demo
      ddk-pipe inspect runs/demo
    """
    _prepare_machine()
    from ddk_pipe.stages.demo import demo as run

    run(folder)


def _project(manifest: Path, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    """The checked project; everything wrong with the manifest is said before anything heavy is imported."""
    from ddk_pipe.pipeline.manifest import load_project

    project = load_project(manifest, overrides)
    _prepare_machine()
    return project


def _prepare_machine() -> None:
    from ddk_pipe.stages.runtime import prepare_cpu

    prepare_cpu()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
