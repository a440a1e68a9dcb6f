"""Which GPU's launches a device takes; no GPU is touched."""

from __future__ import annotations

import pytest
import torch
from interpreter import needs_triton


@needs_triton
@pytest.mark.parametrize(
    ("capability", "gpu"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_90")]
)
def test_nvidia_by_capability(capability: tuple[int, int], gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.layer import gpu_of

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu_of(torch.device("cuda", 0)) == gpu


@needs_triton
def test_amd_and_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.layer import gpu_of

    monkeypatch.setattr(torch.version, "hip", None)
    assert gpu_of(torch.device("cpu")) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu_of(torch.device("cuda", 0)) == "gfx942"


@needs_triton
def test_every_gpu_has_launches_for_both_sizes_of_operand() -> None:
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl.launches import LAUNCHES, PRECISIONS

    assert LAUNCHES.keys() == {(gpu, size) for gpu in PRECISIONS for size in (2, 4)}
