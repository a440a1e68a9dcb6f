"""The commands to start with: init, schema, demo. Heavy imports stand inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.cli.arguments import DEFAULT_MANIFEST, ManifestArgument, prepare_machine


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
    prepare_machine()
    from ddk_pipe.stages.demo import demo as run

    run(folder, material=material)
