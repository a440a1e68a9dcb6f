"""Comparing two runs of `distill`: what must be equal to the bit, and what may differ (clocks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ddk_pipe.pipeline.metrics import read_rows

CLOCKS = ("tokens_per_second", "data_wait_seconds")


def rows_of(run: Path, table: str) -> list[dict[str, Any]]:
    """The rows of one table without times."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_rows(run, table)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The student's weights."""
    return load_file(run / "student" / "model.safetensors")


def assert_same_bits(run: Path, other: Path) -> None:
    """Final weights, every metric and the data order of two runs are equal."""
    for table in ("steps", "validation"):
        assert rows_of(run, table) == rows_of(other, table)
    mine, theirs = weights_of(run), weights_of(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def order_of(run: Path) -> list[tuple[int, str]]:
    """(step, digest of the step's windows)."""
    return [(row["step"], row["data_order"]) for row in rows_of(run, "steps")]
