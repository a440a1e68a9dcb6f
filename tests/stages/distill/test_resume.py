"""Killed and started again: the same bits on one process and on two, the same data order on another number."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import distill_command, finish, kill_when, start_ranks
from runs import assert_same_bits, order_of, rows_of, weights_of

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, Student, load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.stages.distill import distill, pace
from ddk_pipe.stages.distill.batches import StepData
from ddk_pipe.stages.distill.intervals import end_interval
from ddk_pipe.stages.distill.journal import Journal
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.sources import CacheSource
from ddk_pipe.stages.distill.step import Stepper, step_seed

STEPS, INTERVAL, CHECKPOINT = 14, 5, 2
SETS = (
    f"distill.steps={STEPS}",
    f"distill.interval_steps={INTERVAL}",
    f"distill.checkpoint_steps={CHECKPOINT}",
    "distill.batch_tokens=256",
)


def run_folder(manifest: Path, name: str) -> Path:
    return manifest.parent / "out" / "distill" / name


def whole_run(manifest: Path, *sets: str) -> Path:
    """An undisturbed run in this process."""
    distill(load_project(manifest, [*SETS, *sets, "distill.name=whole"]))
    return run_folder(manifest, "whole")


def steps_done(run: Path) -> int:
    return max([row["step"] for row in read_rows(run, "steps")], default=0)


def kill_after(manifest: Path, name: str, step: int, ranks: int | None, *sets: str) -> None:
    """Start (or continue) a run and kill it as soon as the record shows that step."""
    run = run_folder(manifest, name)
    processes = start_ranks(distill_command(manifest, *SETS, *sets, f"distill.name={name}"), ranks)
    folder, due = run / "checkpoints", step > CHECKPOINT  # ranks write theirs in the background
    kill_when(processes, lambda: steps_done(run) >= step and (not due or any(folder.glob("step-*"))))
    assert not (run / "run.json").exists(), "it was faster than the kill"


@pytest.mark.slow
def test_kill_9_at_random_steps_leaves_no_trace(cached: Path) -> None:
    whole = whole_run(cached)
    random_steps = sorted(random.sample(range(1, STEPS - 6), 2))
    print("killed after", random_steps)  # shown if it fails
    for step in random_steps:
        kill_after(cached, "cut", step, None)
    distill(load_project(cached, [*SETS, "distill.name=cut"]))
    assert [row["step"] for row in rows_of(whole, "steps")] == list(range(1, STEPS + 1))
    assert_same_bits(whole, run_folder(cached, "cut"))
    assert not list(run_folder(cached, "cut").glob("checkpoints"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen processes, one minute where nobody else runs
def test_two_ranks_resume_to_the_same_bits_and_other_numbers_in_the_same_order(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = "distill.parallel=fsdp"
    alone = whole_run(cached)
    finish(start_ranks(distill_command(cached, *SETS, sharded, "distill.name=pair"), 2))
    pair = run_folder(cached, "pair")
    cut = run_folder(cached, "cut")
    # first from a checkpoint made right after a validation (FSDP2's root is whole then), next from one in between
    kill_after(cached, "cut", INTERVAL + 1, 2, sharded, "distill.checkpoint_steps=null")
    assert checkpoints_of(cut) == [INTERVAL]
    kill_after(cached, "cut", INTERVAL + random.randrange(2, 4), 2, sharded)
    assert checkpoints_of(cut)
    shutil.copytree(cut, run_folder(cached, "shrunk"))
    finish(start_ranks(distill_command(cached, *SETS, sharded, "distill.name=cut"), 2))
    assert_same_bits(pair, cut)
    # two processes' checkpoint, continued by one
    distill(load_project(cached, [*SETS, "distill.name=shrunk"]))
    # and one process's, continued by two
    stop_at(monkeypatch, CHECKPOINT + 2)
    with pytest.raises(KeyboardInterrupt):
        distill(load_project(cached, [*SETS, "distill.name=grown"]))
    monkeypatch.undo()
    finish(start_ranks(distill_command(cached, *SETS, "distill.name=grown"), 2))
    for name in ("shrunk", "grown", "pair"):
        run = run_folder(cached, name)
        assert order_of(run) == order_of(alone)
        for mine, theirs in zip(rows_of(run, "steps"), rows_of(alone, "steps"), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for weight, value in weights_of(run).items():
            torch.testing.assert_close(value, weights_of(alone)[weight], rtol=1e-3, atol=1e-4)


# --- what is drawn at random ------------------------------------------------------------------------


def test_a_steps_draws_are_of_seed_step_and_rank_alone() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(5) for rank in range(5)}
    assert len(seeds) == 125 and max(seeds) < 2**63
    assert step_seed(1, 11, 0) != step_seed(11, 1, 0) and step_seed(0, 3, 1) == step_seed(0, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_dropout_goes_on_to_the_same_bits(
    cached: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """A fresh student, of the dropout that its kind has unasked; in micro batches."""
    gpt2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    sets = ["distill.micro_batch_windows=2", f"distill.activation_checkpointing={str(checkpointing).lower()}"]

    def run(name: str) -> Project:
        project = load_project(cached, [*sets, f"distill.name={name}"])
        student = Student(config={**gpt2, "bos_token_id": 0, "eos_token_id": 0})
        return Project(project.manifest.model_copy(update={"student": student}), project.root)

    distill(run("whole"))
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        distill(run("cut"))
    torch.manual_seed(123)  # another process begins elsewhere
    distill(run("cut"))
    assert_same_bits(run_folder(cached, "whole"), run_folder(cached, "cut"))
    rows = rows_of(run_folder(cached, "whole"), "steps")
    gpt2.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    distill(run("without"))
    assert rows[0]["loss"] != rows_of(run_folder(cached, "without"), "steps")[0]["loss"], (
        "nothing was dropped"
    )


# --- checkpoints ----------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGINT) -> None:
    """Send this process a signal in the middle of that step, once."""
    real = Run._step
    sent: list[int] = []

    def signalled(self: Run, position: Any, data: Any) -> Any:
        if position.step == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return real(self, position, data)

    monkeypatch.setattr(Run, "_step", signalled)


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_keep_last_and_keep_best(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = ["distill.steps=12", "distill.checkpoint_steps=1", "distill.keep_last=2", "distill.keep_best=true"]
    gaps = iter([1.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0])

    def with_gap(parts: Parts, journal: Journal, position: Position) -> None:
        """The student gets worse after the second interval: which is best must not depend on luck."""
        teacher_ce, gap = parts.teacher_ce, next(gaps)
        outcome = parts.validation.run()
        parts.teacher_ce = outcome.student_ce - gap
        end_interval(parts, journal, position)
        parts.teacher_ce = teacher_ce

    monkeypatch.setattr("ddk_pipe.stages.distill.run.end_interval", with_gap)
    stop_at(monkeypatch, 7)
    project = load_project(cached, sets)
    with pytest.raises(KeyboardInterrupt):
        distill(project)
    assert checkpoints_of(project.run) == [2, 6, 7]  # the best, and the last two
    summary = distill(project)
    assert summary["best_step"] == 2
    assert (project.run / "best" / "model.safetensors").exists()
    assert not (project.run / "checkpoints").exists()


def test_sigterm_saves_and_says_143(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddk_pipe.stages.common import Terminated

    stop_at(monkeypatch, 3, signal.SIGTERM)
    monkeypatch.setattr("ddk_pipe.stages.common.stopping._leave_after", lambda *_: None)
    project = load_project(cached)
    with pytest.raises(Terminated):
        distill(project)
    assert checkpoints_of(project.run) == [3]


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        distill(load_project(cached))
    with pytest.raises(
        DdkError, match=r"with other settings \(distill\.gamma 0\.2, now 0\.5\); set another distill\.name"
    ):
        distill(load_project(cached, ["distill.gamma=0.5"]))
    free = ["distill.keep_last=3", "distill.checkpoint_steps=2", "distill.activation_checkpointing=true"]
    assert distill(load_project(cached, free))["steps"] == 6  # these may change


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tensors", "position"])
def test_a_damaged_checkpoint_is_named(cached: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 3)
    project = load_project(cached)
    with pytest.raises(KeyboardInterrupt):
        distill(project)
    folder = project.run / "checkpoints" / "step-00000003"
    victim = {
        "tensors": next(folder.glob("*.safetensors")),
        "position": folder / "position.json",
    }[how]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(DdkError, match=r"step-00000003: the checkpoint cannot be read.*delete that folder"):
        distill(project)
    shutil.rmtree(folder)
    assert distill(project)["steps"] == 6


# --- a loss that is not a number --------------------------------------------------------------------


def test_nan_names_step_domain_and_window_and_keeps_the_last_good_checkpoint(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that no sound cache has: one window's targets turn NaN, from the fourth step on. It is found where the
    losses are read, two steps later, and no step after the third has changed the weights."""
    project = load_project(
        cached, ["distill.checkpoint_steps=3", "distill.interval_steps=6", "distill.log_steps=10"]
    )
    sick: list[tuple[int, int]] = []
    weights: list[torch.Tensor] = []
    real, real_read = Stepper.step, CacheSource.read

    def step(self: Stepper, done: int, data: StepData) -> None:
        weight = next(self.wrapped.student.parameters())
        if done == 3:
            sick.append(tuple(data.names[1].tolist()))
            rows = data.batches[0].rows
            of_second = rows.live // len(data.batches[0].tokens[0]) == 1
            rows.log_weights[of_second] = float("nan")
            weights.append(weight.detach().clone())
        real(self, done, data)
        if done >= 3:
            weights.append(weight.detach().clone())

    def read(self: CacheSource, domain: int, window: int) -> CachedWindow:
        found = real_read(self, domain, window)
        if (domain, window) in sick:
            found.targets.logprobs[:] = float("nan")
        return found

    monkeypatch.setattr(CacheSource, "read", read)
    monkeypatch.setattr(pace, "SECONDS", 1000.0)  # on a slow machine too
    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(DdkError) as failure:
        distill(project)
    domain, window = sick[0]
    assert (
        f"at step 4; the window whose loss or gradient is not finite is {('code', 'plays')[domain]}/train/{window}"
        in str(failure.value)
    )
    assert len(weights) == 4 and all(weight.equal(weights[0]) for weight in weights)
    assert [row["step"] for row in read_rows(project.run, "steps")] == [1, 2, 3]
    assert checkpoints_of(project.run) == [3]
    position = json.loads((project.run / "checkpoints" / "step-00000003" / "position.json").read_text())
    assert position["step"] == 3 and not (project.run / "run.json").exists()
    monkeypatch.undo()
    assert distill(project)["steps"] == 6  # and it continues once the cause is gone
