"""The device of the tests that are for a GPU. DDK_GPU_TESTS=cpu runs them on the CPU, as far as it goes there."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A CUDA device, or what DDK_GPU_TESTS names. Skips where there is none."""
    named = os.environ.get("DDK_GPU_TESTS", "cuda")
    if named == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(named)
