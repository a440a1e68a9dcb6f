"""Are a model's files what their names say? Told before an engine tries, whose words would name no file."""

from __future__ import annotations

import json
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError, reason

LFS_POINTER = b"version https://git-lfs.github.com/"  # what a clone without Git LFS has in place of a file
DOWNLOAD_AGAIN = "download it again"


def check_pointers(folder: Path, patterns: list[str], *, field: str) -> None:
    """Raises DdkError for a file that is the note of Git LFS about it."""
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        if path.is_file() and _begins(path, LFS_POINTER):
            raise DdkError(
                f"{field}: {path} is a Git LFS pointer, not the file",
                hint=f"run `git lfs pull` in {folder}, or {DOWNLOAD_AGAIN}",
            )


def check_weight_files(folder: Path, *, field: str) -> None:
    """Every safetensors file is whole, and those that the index names are there. Reads headers alone.

    Raises DdkError naming the file.
    """
    from safetensors import SafetensorError, safe_open

    for path in [*_indexed(folder, field=field), *sorted(folder.glob("*.safetensors"))]:
        try:
            with safe_open(path, "pt"):
                pass
        except FileNotFoundError:
            raise DdkError(
                f"{field}: {path} is missing, and the index names it", hint=DOWNLOAD_AGAIN
            ) from None
        except (SafetensorError, OSError, ValueError) as problem:
            raise DdkError(
                f"{field}: {path} is cut short, or no safetensors file ({reason(problem)})",
                hint=f"{DOWNLOAD_AGAIN}, or save the model again with save_pretrained",
            ) from None


def _indexed(folder: Path, *, field: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise DdkError(f"{field}: {index} is damaged ({reason(problem)})", hint=DOWNLOAD_AGAIN) from None
    if wrong:  # it may name any file, and what is no safetensors file is unpickled
        raise DdkError(
            f"{field}: {index} names {wrong[0]!r}, which is no *.safetensors of that folder",
            hint="save the model again with save_pretrained",
        )
    return [folder / name for name in names]


def _begins(path: Path, content: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(content)) == content
