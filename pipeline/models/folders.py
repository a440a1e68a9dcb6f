"""Model folders: found, checked and fingerprinted without loading a weight."""

from __future__ import annotations

import json
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.models.files import check_pointers, check_weight_files
from ddk_pipe.pipeline.storage import durable

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def model_folder(name: str, *, field: str, revision: str | None = None) -> Path:
    """The local folder of a model: `name` itself, or a snapshot of that hub id (downloaded if it must be).

    Raises DdkError if there is none, if it holds no configuration or no safetensors weights, or Git LFS's notes about them.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith(("/", "./", "../", "~")):
            raise DdkError(f"{field}: no folder {name}", hint="mend the path")
        folder = _snapshot(name, field=field, revision=revision)
    if not (folder / "config.json").is_file():
        raise DdkError(f"{field}: {folder} holds no config.json", hint="name a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise DdkError(
            f"{field}: {folder} holds no weights (*.safetensors)",
            hint="download the weights, or save them with save_pretrained",
        )
    check_pointers(folder, WANTED, field=field)
    check_weight_files(folder, field=field)
    return folder


def _snapshot(name: str, *, field: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except Exception as problem:  # noqa: BLE001 - unknown id, no network, gated: the library has many kinds
        raise DdkError(
            f"{field}: {name} is neither a folder nor to be had from the Hugging Face hub ({reason(problem)})",
            hint="mend the path or id",
        ) from None


def model_here(name: str, *, revision: str | None = None) -> Path | None:
    """The folder of a model if it is on this machine, else None: nothing is downloaded, nothing checked."""
    from huggingface_hub import snapshot_download

    folder = Path(name)
    if not folder.is_dir():
        if name.startswith(("/", "./", "../", "~")):
            return None
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:  # noqa: BLE001 - not there, no id: the library has many kinds
            return None
    there = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return folder if there else None


def weights_digest(folder: Path) -> str:
    """Fingerprint of a model: the content of its configuration, of every weight file and of its own code.

    Code is every *.py in the folder and below it (`trust_remote_code` runs it: it says what the weights mean); hidden
    folders (.git, .cache) are no part of the model. Models without code have the digests they had before.
    """
    files = [
        [path.relative_to(folder).as_posix(), durable.file_digest(path)] for path in weights_files(folder)
    ]
    return durable.digest(json.dumps(files).encode())


def weights_files(folder: Path) -> list[Path]:
    """The files that `weights_digest` is of: configuration, weights, code."""
    code = (path for path in folder.rglob("*.py") if not _is_hidden(path.relative_to(folder)))
    return [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(code)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
