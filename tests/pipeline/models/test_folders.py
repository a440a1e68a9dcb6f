"""Fingerprints of model folders: everything that says what the model predicts, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ddk_pipe.pipeline.models import weights_digest

FILES = {
    "config.json": "{}",
    "model-1.safetensors": "weights",
    "model-2.safetensors": "more weights",
    "modeling_own.py": "import torch",
    "layers/attention.py": "def attend(): ...",
    "README.md": "a model",
    ".cache/huggingface/tool.py": "left by a download",
    "__pycache__/modeling_own.cpython-311.pyc": "compiled",
}
PART_OF_IT = {name for name in FILES if name.endswith((".json", ".safetensors", ".py")) and name[0] != "."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def change(path: Path) -> None:
    path.write_text("something else")


def rename(path: Path) -> None:
    path.rename(path.with_name("a" + path.name))


@pytest.mark.parametrize(
    ("name", "edit"),
    [(name, change) for name in FILES]
    + [(name, edit) for name in FILES if name != "config.json" for edit in (rename, Path.unlink)],
)
def test_the_digest_follows_what_the_model_is(folder: Path, name: str, edit: Callable[[Path], None]) -> None:
    before = weights_digest(folder)
    assert weights_digest(folder) == before
    edit(folder / name)
    assert (weights_digest(folder) != before) == (name in PART_OF_IT)


def test_a_model_without_code_has_the_digest_it_always_had(folder: Path) -> None:
    """Caches made before code was part of it stay valid; the value is of the version before."""
    for path in folder.rglob("*.py"):
        path.unlink()
    assert weights_digest(folder) == "ccdbad361a1f00743e96df13926740b7"
