"""Checkpoints written beside the steps: of the step they were begun in, whole when they have their name, failures heard."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits
from torch import Tensor

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.checkpoints import Checkpoints, writing
from ddk_pipe.stages.distill.checkpoints.tensor_files import write_tensors
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.world import World, Wrapped

SETS = ("distill.steps=8", "distill.interval_steps=4", "distill.checkpoint_steps=2", "distill.log_steps=1")


class Held:
    """A writer that waits until it is let go, and fails then if it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.problem: Exception | None = None
        patch.setattr(writing, "write_tensors", self)

    def __call__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        assert self.go.wait(60)
        if self.problem is not None:
            folder.mkdir(parents=True)
            (folder / "half.safetensors").write_bytes(b"half")
            raise self.problem
        write_tensors(folder, tensors)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    writer = Held(monkeypatch)
    yield writer
    writer.go.set()


def of_student(folder: Path, seed: int = 0) -> Checkpoints:
    """Checkpoints of a small module whose optimizer has its moments."""
    torch.manual_seed(seed)
    student: Any = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    student(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return Checkpoints(
        folder, Wrapped(student, student, World(), sharded=False), optimizer, keep_last=3, keep_best=False
    )


def tensors_of(checkpoints: Checkpoints) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoints._tensors().items()}


def test_it_holds_the_step_it_was_begun_in(held: Held, tmp_path: Path) -> None:
    """Weights, moments and the position change while it is written."""
    checkpoints = of_student(tmp_path / "checkpoints")
    wanted = tensors_of(checkpoints)
    checkpoints.save({"step": 3, "gap": None})
    checkpoints.optimizer.step()
    checkpoints.poll()
    assert checkpoints.found() == []
    held.go.set()
    checkpoints.settle()
    (found,) = checkpoints.found()
    assert found.step == 3 and not list((tmp_path / "checkpoints").glob(".*"))
    other = of_student(tmp_path / "checkpoints", seed=1)
    other.load(found)
    read = tensors_of(other)
    assert read.keys() == wanted.keys() and all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(tensor, wanted[name]) for name, tensor in tensors_of(checkpoints).items())


def test_a_poll_names_it_once_it_is_written(held: Held, tmp_path: Path) -> None:
    checkpoints = of_student(tmp_path)
    checkpoints.save({"step": 3, "gap": None})
    held.go.set()
    end = time.monotonic() + 60
    while not checkpoints.found():
        assert time.monotonic() < end
        checkpoints.poll()
    assert [found.step for found in checkpoints.found()] == [3]


@pytest.mark.parametrize("heard_by", ["poll", "settle", "save"])
def test_a_writer_that_fails_is_heard_and_leaves_nothing(held: Held, tmp_path: Path, heard_by: str) -> None:
    checkpoints = of_student(tmp_path)
    held.problem = OSError(errno.EIO, "the disk is broken")
    checkpoints.save({"step": 3, "gap": None})
    held.go.set()
    with pytest.raises(DdkError, match=r"step-00000003: .*the disk is broken"):
        if heard_by == "save":
            checkpoints.save({"step": 4, "gap": None})
        for _ in range(6000 if heard_by == "poll" else 1):
            getattr(checkpoints, heard_by)()
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []
    held.problem = None
    checkpoints.save({"step": 3, "gap": None})  # and the next may succeed
    checkpoints.settle()
    assert [found.step for found in checkpoints.found()] == [3]


def test_on_the_way_out_of_a_failed_run_its_own_error_counts(held: Held, tmp_path: Path) -> None:
    checkpoints = of_student(tmp_path)
    held.problem = OSError(errno.EIO, "the disk is broken")
    checkpoints.save({"step": 3, "gap": None})
    held.go.set()
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            checkpoints.settle_quietly()
    assert list(tmp_path.iterdir()) == []


# --- whole runs -----------------------------------------------------------------------------------


def slowed(patch: pytest.MonkeyPatch, fails_from: int | None = None) -> None:
    """Every checkpoint takes longer to write than some steps, and from that step on none succeeds."""

    def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        time.sleep(0.3)
        if fails_from is not None and folder.name >= f".step-{fails_from:08d}":
            raise OSError(errno.EIO, "the disk is broken")
        write_tensors(folder, tensors)

    patch.setattr(writing, "write_tensors", write)


def stop_before(patch: pytest.MonkeyPatch, step: int) -> None:
    real = Run._step

    def interrupted(self: Run, position: Any, data: Any) -> Any:
        if position.step == step - 1:
            raise KeyboardInterrupt
        return real(self, position, data)

    patch.setattr(Run, "_step", interrupted)


@pytest.mark.slow
def test_a_run_that_is_broken_off_waits_for_it_and_goes_on_to_the_same_bits(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_project(cached, [*SETS, "distill.name=whole"])
    distill(whole)
    cut = load_project(cached, [*SETS, "distill.name=cut"])
    for step, saved in ((3, 2), (6, 4)):  # right after one was begun, and a step later
        with monkeypatch.context() as patch:
            slowed(patch)
            stop_before(patch, step)
            with pytest.raises(KeyboardInterrupt):
                distill(cut)
        assert [folder.name for folder in (cut.run / "checkpoints").iterdir()] == [f"step-{saved:08d}"]
    distill(cut)
    assert_same_bits(cut.run, whole.run)


@pytest.mark.slow
def test_a_run_whose_writer_fails_ends_and_keeps_the_checkpoint_before(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = load_project(cached, list(SETS))
    with monkeypatch.context() as patch:
        slowed(patch, fails_from=4)
        with pytest.raises(DdkError, match=r"step-00000004: .*the disk is broken"):
            distill(project)
    assert [folder.name for folder in (project.run / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (project.run / "run.json").exists()
    assert max(row["step"] for row in read_rows(project.run, "steps")) <= 6
    assert distill(project)["steps"] == 8
