"""What most commands take, a manifest with changes for this call, and what they need before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ddk_pipe.pipeline.manifest import Project

ManifestArgument = Annotated[Path, typer.Argument(help="the manifest (YAML)")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="change one field for this call, e.g. --set distill.steps=50; may be repeated"
    ),
]
DEFAULT_MANIFEST = Path("manifest.yaml")


def checked_project(manifest: Path, overrides: list[str] | None) -> Project:
    """The checked project; everything wrong with the manifest is said before anything heavy is imported."""
    from ddk_pipe.pipeline.manifest import load_project

    project = load_project(manifest, overrides)
    prepare_machine()
    return project


def prepare_machine() -> None:
    """Before torch is imported (`prepare_cpu`)."""
    from ddk_pipe.stages.common import prepare_cpu

    prepare_cpu()
