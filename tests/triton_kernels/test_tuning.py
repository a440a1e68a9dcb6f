"""Which launch is taken: the default, unless tuning is on; then the fastest, timed once for a class of
shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreter import needs_triton, run_python

from ddk_pipe.triton_kernels import tuning

LAUNCHES = ("safe", "quick", "slow")
MILLISECONDS = {"safe": 2.0, "quick": 1.0, "slow": 3.0}
GPU = torch.device("cuda", 0)  # only named: nothing here touches one


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tuning on, its stopwatch replaced; what was timed."""
    seen: list[str] = []

    def milliseconds(run: Callable[[str], object], launch: str) -> float:
        seen.append(launch)
        run(launch)
        return MILLISECONDS[launch]

    monkeypatch.setattr(tuning, "TUNE", True)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return seen


def pick(shape_class: object = (), device: torch.device = GPU, launches: tuple[str, ...] = LAUNCHES) -> str:
    return tuning.pick(launches, (shape_class,), lambda: lambda launch: None, device)


def test_without_tuning_it_is_the_first_and_nothing_is_run() -> None:
    def trial() -> Callable[[str], object]:
        raise AssertionError("nothing is to be timed")

    assert not tuning.TUNE, "DDK_TRITON_TUNE is set for the tests"
    assert tuning.pick(LAUNCHES, (), trial, GPU) == "safe"


def test_the_fastest_is_timed_once_for_a_class_of_shapes(timed: list[str]) -> None:
    assert [pick("a"), pick("a"), pick("b")] == ["quick"] * 3
    assert timed == [*LAUNCHES, *LAUNCHES]


def test_nothing_is_timed_on_a_cpu_or_without_a_choice(timed: list[str]) -> None:
    assert pick(device=torch.device("cpu")) == "safe"
    assert pick(launches=("safe",)) == "safe"
    assert timed == []


@pytest.mark.parametrize(("size", "same_as"), [(1, 1), (3, 4), (33, 64), (49152, 65536), (65537, 131072)])
def test_sizes_share_a_class_up_to_the_next_power_of_two(size: int, same_as: int) -> None:
    assert tuning.size_class(size) == tuning.size_class(same_as)
    assert tuning.size_class(same_as) != tuning.size_class(same_as + 1)


@pytest.mark.slow
@needs_triton
def test_tuning_times_a_copy_and_changes_no_result() -> None:
    """In the interpreter, told that its tensors lie on a GPU: every launch is tried, the logits are written
    once."""
    program = """
import torch
from ddk_pipe.triton_kernels import sparse_kl as rows, fused_linear_sparse_kl as fused, tuning
tried = []
def milliseconds(run, launch):
    run(launch)
    tried.append(launch)
    return -len(tried)  # the last tried is the fastest
torch.manual_seed(0)
h, w, y = torch.randn(5, 16), torch.randn(300, 16), torch.tensor([3, 7, -100, 9, 299])
ids = torch.arange(4, dtype=torch.int32).repeat(5, 1) * 9
log_w, tail = torch.full((5, 4), -2.0), torch.full((5,), -0.78)
def both():
    z = h @ w.t()
    return [*rows.sparse_kl(z, y, ids, log_w, tail, gamma=1.0), z,
            *fused.fused_linear_sparse_kl(h, w, y, ids, log_w, tail, gamma=1.0)]
safe = both()
def pick(launches, shape_class, trial, device, inner=tuning.pick):
    return inner(launches, shape_class, trial, torch.device("meta"))
tuning.TUNE, tuning._milliseconds, tuning.pick = True, milliseconds, pick
tuned = both()
shipped = [*rows.LAUNCHES[0], *2 * fused.LAUNCHES["sm_90", 4], *fused.PUTS]
assert sorted(map(str, tried)) == sorted(map(str, shipped)), tried
for a, b in zip(safe, tuned, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
print("same")
"""
    done = run_python("-W", "ignore", "-c", program, interpret=True)
    assert done.stdout.strip() == "same", done.stderr
