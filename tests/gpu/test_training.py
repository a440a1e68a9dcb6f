"""A small run on the GPU: the CPU's losses, no waits, going on after a stop, compiled layers, and no step that is not
finite."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import order_of, rows_of
from tiny import MakeProject

from ddk_pipe.pipeline.cache import CacheReader
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.storage import open_folder
from ddk_pipe.pipeline.text import TRAIN
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.windows import steps_of_windows

pytestmark = pytest.mark.gpu
STEPS = 6
SETS = [f"distill.steps={STEPS}", "distill.interval_steps=3", "distill.batch_tokens=256"]
# relative, of a step's loss: float32 with TF32 off, and bfloat16 autocast
FLOAT32, BFLOAT16 = 1e-4, 2e-2


def losses(manifest: Path, device: torch.device | str, *sets: str) -> list[float]:
    project = load_project(manifest, [*SETS, f"distill.device={device}", *sets])
    distill(project)
    return [row["loss"] for row in rows_of(project.run, "steps")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_losses_are_the_cpus(
    make_project: MakeProject, device: torch.device, precision: str, temperature: float
) -> None:
    manifest = make_project(cache={"scheme": "topk", "k": 8, "temperatures": [1.0, 2.0], "shard_windows": 16})
    cache_teacher(load_project(manifest))
    at = f"distill.temperature={temperature}"
    wanted = losses(manifest, "cpu", "distill.name=cpu", "distill.precision=float32", at)
    found = losses(manifest, device, "distill.name=gpu", f"distill.precision={precision}", at)
    bound = FLOAT32 if precision == "float32" else BFLOAT16
    assert found == pytest.approx(wanted, rel=bound)


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Waiting for the device is an error inside; torch knows of most of it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_waits_for_nothing(cached: Path, device: torch.device) -> None:
    parts = Parts(load_project(cached, [*SETS, f"distill.device={device}"]))
    position = Position(0, 0.0, [0.5, 0.5], [0.5, 0.5], parts.sampler.state_dict(), "")
    data = steps_of_windows(parts, position)
    parts.stepper.step(0, next(data))  # compiles kernels, and tries them once
    with no_waits(device):
        parts.stepper.step(1, next(data))
    assert [row["step"] for row in parts.stepper.settle()] == [1, 2]


def test_a_step_that_is_not_finite_changes_nothing(cached: Path, device: torch.device) -> None:
    parts = Parts(load_project(cached, [*SETS, f"distill.device={device}"]))
    position = Position(0, 0.0, [0.5, 0.5], [0.5, 0.5], parts.sampler.state_dict(), "")
    data = steps_of_windows(parts, position)
    parts.stepper.step(0, next(data))
    before = [parameter.detach().clone() for parameter in parts.student.parameters()]
    sick = next(data)
    sick.batches[0].rows.log_weights[:] = math.nan
    parts.stepper.step(1, sick)
    parts.stepper.step(2, next(data))  # a sound one: skipped too, or it could not be said what went wrong
    with pytest.raises(DdkError, match="at step 2; the window"):
        list(parts.stepper.settle())
    after = list(parts.student.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_stopped_run_goes_on(cached: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same numbers up to the order in which a GPU adds up."""
    whole = losses(cached, device, "distill.name=whole")
    real = Run._step
    sent: list[int] = []

    def step(self: Run, position: Position, data: Any) -> None:
        if position.step == 2 and not sent:
            sent.append(position.step)
            os.kill(os.getpid(), signal.SIGINT)
        real(self, position, data)

    monkeypatch.setattr(Run, "_step", step)
    sets = [*SETS, f"distill.device={device}", "distill.name=stopped", "distill.log_steps=1"]
    with pytest.raises(KeyboardInterrupt):
        distill(load_project(cached, sets))
    assert losses(cached, device, "distill.name=stopped") == pytest.approx(whole, rel=FLOAT32)
    folder = cached.parent / "out" / "distill"
    assert order_of(folder / "stopped") == order_of(folder / "whole")


@pytest.mark.filterwarnings("ignore")  # torch warns about itself while it compiles
def test_compiled_layers(cached: Path, device: torch.device) -> None:
    plain = losses(cached, device, "distill.precision=float32", "distill.name=plain")
    compiled = losses(
        cached, device, "distill.precision=float32", "distill.name=compiled", "distill.compile=true"
    )
    assert compiled == pytest.approx(plain, rel=FLOAT32)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_cache_made_there_holds_the_same_teacher(
    make_project: MakeProject, cached_output: Path, device: torch.device, engine: str
) -> None:
    """The label's log-probabilities, which every engine and device must agree on."""
    if engine == "vllm" and (importlib.util.find_spec("vllm") is None or device.type == "cpu"):
        pytest.skip("vLLM is not installed, or it is the CPU's, which tests/real is for")
    manifest = make_project()
    sets = [f"teacher.backend={engine}", f"teacher.device={device}", "teacher.dtype=float32"]
    project = load_project(manifest, sets)
    cache_teacher(project)
    found = CacheReader(project.cache, 1.0).read("code", TRAIN, 0)
    wanted = CacheReader(open_folder(cached_output / "cache"), 1.0).read("code", TRAIN, 0)
    assert (found.tokens == wanted.tokens).all()
    assert found.label_logprobs == pytest.approx(wanted.label_logprobs, abs=2e-3, nan_ok=True)
