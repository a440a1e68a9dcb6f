"""`ddk-pipe report`: a run or a sweep as one HTML page, as pictures, and as text in the terminal."""

from __future__ import annotations

from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import say
from ddk_pipe.stages.report.data import load_report
from ddk_pipe.stages.report.tables import show

FORMATS = ("html", "png", "svg")


def report(place: Path, *, kind: str = "html", out: Path | None = None) -> list[Path]:
    """Print the text, write the page or the pictures; returns the files.

    Raises DdkError for a folder that is neither a run nor a sweep, and for an unknown format.
    """
    if kind not in FORMATS:
        raise DdkError(f"--format {kind}: unknown", hint=f"use one of {', '.join(FORMATS)}")
    found = load_report(place)
    show(found)
    place = found.folder
    from ddk_pipe.stages.report.figures import pictures

    drawn = list(pictures(found))
    if kind == "html":
        from ddk_pipe.stages.report.page import page

        files = {out or place / "report.html": page(found, drawn).encode()}
    else:
        folder = out or place / "pictures"
        files = {folder / f"{picture.name}.{kind}": picture.file(kind) for picture in drawn}
    for path, content in files.items():
        durable.write_file(path.absolute(), content)
    where = next(iter(files), None)
    say(
        f"report: {where if len(files) == 1 else f'{len(files)} pictures in {where.parent if where else place}'}"
    )
    return list(files)
