"""Rows of a fresh student's output layer: the teacher's ids, and padding, for GPUs multiply by 64 columns at a time.

No label and no target names an id of the padding: it takes softmax mass, and training takes that from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

MULTIPLE = 64


def padded(ids: int) -> int:
    """The next multiple of 64."""
    return -(-ids // MULTIPLE) * MULTIPLE


def rows_in_checkpoint(lm: Any, checkpoints: Path) -> int | None:
    """Rows of this model's output layer in the run's newest checkpoint. None without one, or where it cannot be read:
    then whoever loads it says why."""
    newest = max(checkpoints.glob("step-*"), default=None)
    if newest is None:
        return None
    weight = lm.get_output_embeddings().weight  # tied or not, it goes by the first of its names
    name = next(f"model.lm.{name}" for name, each in lm.named_parameters() if each is weight)
    try:
        rows = sum(_rows(file, name) for file in newest.glob("*.safetensors"))
    except Exception:  # noqa: BLE001 - whatever a damaged file leads to
        return None
    return rows or None


def _rows(file: Path, name: str) -> int:
    """Of the part of a tensor that is in this file: only the header is read."""
    if file.is_symlink() or not file.is_file():
        return 0
    with safe_open(file, framework="pt") as opened:
        return int(opened.get_slice(name).get_shape()[0]) if name in opened.keys() else 0  # noqa: SIM118 - no dict


def silence(lm: Any, ids: int) -> None:
    """Let transformers' generate() never choose an id from `ids` on, whatever its logit: the tokenizer has no such."""
    rows = int(lm.get_output_embeddings().weight.shape[0])
    settings = getattr(lm, "generation_config", None)
    if settings is not None and rows > ids:
        settings.suppress_tokens = list(range(ids, rows))
