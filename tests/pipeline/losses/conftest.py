"""Fixtures of the tests with cases from tests/support/loss_cases.py, each of which asks for both by `usefixtures`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ddk_pipe.pipeline.losses import chunks


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows: with one chunk for all, no test would see what is carried between chunks."""
    monkeypatch.setattr(chunks, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunks, "MAX_CHUNK_ROWS", 5)
