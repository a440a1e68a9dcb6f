"""Faults under `ddk-pipe distill`: a full disk, a loss that turns NaN on one of two ranks, ranks told to stop.

The two ranks are started once, by torchrun, for all cases: they run this file as a script, which calls the command
line in the same processes again and again. Last, torchrun itself is told to stop.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import leave_bytes, remount
from ranks import SECONDS, distill_command, finish, kill, start_ranks
from runs import assert_same_bits
from tiny import write_project
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.metrics import read_rows
from ddk_pipe.stages.cli import app, main
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.batches import StepData
from ddk_pipe.stages.distill.checkpoints import writing
from ddk_pipe.stages.distill.checkpoints.tensor_files import write_tensors
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.sources import CacheSource
from ddk_pipe.stages.distill.step import Stepper
from ddk_pipe.stages.distill.world import World, join_world

SETS = ("distill.steps=6", "distill.interval_steps=3", "distill.checkpoint_steps=2")
ROOM = 150_000  # bytes: a third of a checkpoint


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob("step-*"))


def before_step(patch: pytest.MonkeyPatch, step: int, act: Any, *, settled: bool = False) -> None:
    """Call act() before that step is trained, once; `settled`: with no checkpoint under way."""
    real = Run._step
    done: list[int] = []

    def step_after(self: Run, position: Any, data: Any) -> Any:
        if position.step == step - 1 and not done:
            done.append(step)
            if settled:
                self.checkpoints.settle()
            act()
        return real(self, position, data)

    patch.setattr(Run, "_step", step_after)


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_under_training(cached: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a little more each time, from the record to the last files of a checkpoint."""
    distill(load_project(cached, [*SETS, "distill.name=whole"]))
    remount(small_disk, "size=4m,nr_inodes=2000")
    sets = [*SETS, f"output={small_disk / 'out'}", f"cache.path={cached.parent / 'out' / 'cache'}"]
    arguments = ["distill", str(cached), *(word for value in sets for word in ("--set", value))]
    run = small_disk / "out" / "distill" / "student"
    lines = []
    for room in (0, 90_000, 270_000, 360_000):  # a checkpoint takes about 390,000
        with monkeypatch.context() as patch:
            before_step(patch, 4, lambda room=room: leave_bytes(small_disk, room), settled=True)
            result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, result.output
        said = [line for line in result.output.splitlines() if line.startswith("ddk-pipe:")]
        assert len(said) == 1 and "Traceback" not in result.output
        lines += said
        assert checkpoints_of(run) == [3] and not list(run.rglob("*.partial"))
        (small_disk / "filler").unlink()
    assert all(
        re.search(rf"{small_disk}/out/distill/student\S*: no space left on the disk; free some", line)
        for line in lines
    ), lines
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert_same_bits(run, cached.parent / "out" / "distill" / "whole")


# --- two ranks ------------------------------------------------------------------------------------


class Ranks:
    """What one of the ranks does: the command line, case by case."""

    def __init__(self, manifest: Path, world: World) -> None:
        self.manifest, self.world = manifest, world
        self.outcome: dict[str, Any] = {}

    def command(self, case: str, *sets: str) -> None:
        """Exit status and output of every rank, and the checkpoints that are there then."""
        sets = (*SETS, "distill.parallel=fsdp", f"distill.name={case.split('/')[0]}", *sets)
        arguments = ["distill", str(self.manifest), *(word for value in sets for word in ("--set", value))]
        sys.argv = ["ddk-pipe", *arguments]
        result = CliRunner().invoke(app, arguments)
        run = load_project(self.manifest, list(sets)).run
        self.outcome[case] = {
            "status": self.world.gather(result.exit_code),
            "output": self.world.gather(result.output),
            "checkpoints": checkpoints_of(run),
            "files": sorted(path.name for path in (run / "checkpoints").rglob("*.safetensors")),
            "partial": [str(path) for path in run.rglob("*.partial")],
            "run": str(run),
        }
        self.world.wait()

    def all_cases(self) -> None:
        self.command("whole")
        for parallel in ("fsdp", "ddp"):
            with pytest.MonkeyPatch.context() as patch:
                self.turn_nan(patch)
                self.command(f"nan_{parallel}", f"distill.parallel={parallel}")
                self.command(f"nan_{parallel}/alike", f"distill.parallel={parallel}")
        self.command("nan_fsdp/again")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "ddk_pipe.stages.common.stopping._leave_after", lambda *_: None
            )  # it would end this script
            if not self.world.leads:
                before_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
            self.command("stop")
        self.command("stop/again")
        self.command("whole_ddp", "distill.parallel=ddp")
        with pytest.MonkeyPatch.context() as patch:
            fail_from(patch, 4)
            self.command("fail_ddp", "distill.parallel=ddp")
        self.command("fail_ddp/again", "distill.parallel=ddp")

    def turn_nan(self, patch: pytest.MonkeyPatch) -> None:
        """A fault that no sound cache has: from the fourth step on, a window of the second rank has NaN targets."""
        real, real_read, rank = Stepper.step, CacheSource.read, self.world.rank
        sick: list[tuple[int, int]] = []

        def step(self: Stepper, done: int, data: StepData) -> None:
            if done >= 3 and rank == 1:
                domain, window = data.names[0].tolist()
                sick.append((domain, window))
                rows = data.batches[0].rows
                rows.log_weights[rows.live < len(data.batches[0].tokens[0])] = float("nan")
                print(f"sick {self.domains[domain]}/train/{window}")
            real(self, done, data)

        def read(self: CacheSource, domain: int, window: int) -> CachedWindow:
            found = real_read(self, domain, window)
            if (domain, window) in sick:
                found.targets.logprobs[:] = float("nan")
            return found

        patch.setattr(Stepper, "step", step)
        patch.setattr(CacheSource, "read", read)


def fail_from(patch: pytest.MonkeyPatch, step: int) -> None:
    """Writing checkpoints of that step and later ones fails, after a moment."""

    def write(folder: Path, tensors: Any) -> None:
        if int(folder.name.split("-")[1].split(".")[0]) >= step:
            time.sleep(0.2)
            raise OSError(errno.EIO, "the disk is broken")
        write_tensors(folder, tensors)

    patch.setattr(writing, "write_tensors", write)


def fill_disk(disk: Path, arguments: list[str]) -> None:
    """The command line in a process whose disk is filled up before the fourth step, by the first rank."""
    torch.set_num_threads(1)
    if os.environ["RANK"] == "0":
        before_step(pytest.MonkeyPatch(), 4, lambda: leave_bytes(disk, ROOM))
    sys.argv = ["ddk-pipe", *arguments]
    main()


def run_rank(manifest: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with join_world() as world:
        ranks = Ranks(manifest, world)
        ranks.all_cases()
        if world.leads:
            out.write_text(json.dumps(ranks.outcome))
        sys.argv = ["ddk-pipe", "distill", str(manifest), "--set", "distill.name=endless"]
        sys.argv += ["--set", "distill.steps=100000", "--set", "distill.interval_steps=100000"]
        main()


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, cached_output: Path
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    manifest = write_project(folder, tiny_teacher)
    shutil.copytree(cached_output, folder / "out")
    support = Path(__file__).resolve().parents[1] / "support"
    path = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    script = [sys.executable, "-P", __file__, str(manifest), str(folder / "out.json")]
    process = subprocess.Popen(
        [*torchrun, "--nproc-per-node=2", "--no-python", *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    endless, end = folder / "out" / "distill" / "endless", time.monotonic() + SECONDS
    try:
        while not read_rows(endless, "steps"):
            assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    found["endless"] = {
        "status": process.returncode,
        "output": output,
        "checkpoints": checkpoints_of(endless),
        "steps": read_rows(endless, "steps")[-1]["step"],
    }
    found["manifest"] = str(manifest)
    return found


def said(outcome: dict[str, Any]) -> list[str]:
    """What the ranks told the user at the end, all together."""
    return [line for text in outcome["output"] for line in text.splitlines() if line.startswith("ddk-pipe:")]


def assert_same_end(case: str, outcomes: dict[str, Any]) -> None:
    """The same command again has ended as if nothing had happened."""
    assert outcomes["whole"]["status"] == [0, 0] == outcomes[f"{case}/again"]["status"], outcomes
    assert_same_bits(Path(outcomes[case]["run"]), Path(outcomes["whole"]["run"]))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_a_nan_loss_on_one_of_two_ranks(parallel: str, outcomes: dict[str, Any]) -> None:
    found = outcomes[f"nan_{parallel}"]
    assert found["status"] == [2, 2], found["output"]
    (line,) = said(found)
    (sick,) = re.findall(r"^sick (\S+)$", "\n".join(found["output"]), re.MULTILINE)
    assert f"at step 4; the window whose loss or gradient is not finite is {sick};" in line
    assert found["checkpoints"] == [3] and not found["partial"]
    assert said(outcomes[f"nan_{parallel}/alike"]) == [line], (
        "another run ends in the same words, and says them too"
    )
    if parallel == "fsdp":
        assert_same_end("nan_fsdp", outcomes)


@pytest.mark.slow
def test_one_of_two_ranks_told_to_stop(outcomes: dict[str, Any]) -> None:
    found = outcomes["stop"]
    assert found["status"] == [143, 143], found["output"]
    (line,) = said(found)
    assert "terminated; what is finished is kept, run the same command again to continue" in line
    assert found["checkpoints"] == [3] and not found["partial"]
    assert found["files"] == [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]
    assert_same_end("stop", outcomes)


@pytest.mark.slow
def test_a_writer_that_fails_under_two_whole_students(outcomes: dict[str, Any]) -> None:
    """The first rank alone writes, and all of them end with what it says."""
    found = outcomes["fail_ddp"]
    assert found["status"] == [2, 2], found["output"]
    (line,) = said(found)
    assert re.search(r"checkpoints/step-00000004\S*: .*the disk is broken", line), line
    assert found["checkpoints"] == [3] and not found["partial"]
    assert found["files"] == ["shard-00001-model-00001-of-00001.safetensors"]
    assert outcomes["whole_ddp"]["status"] == [0, 0] == outcomes["fail_ddp/again"]["status"], outcomes
    assert_same_bits(Path(found["run"]), Path(outcomes["whole_ddp"]["run"]))


@pytest.mark.slow
def test_torchrun_told_to_stop(outcomes: dict[str, Any]) -> None:
    found = outcomes["endless"]
    assert found["checkpoints"] == [found["steps"]]
    assert found["output"].count("terminated; what is finished is kept, run the same command again") == 1, (
        found["output"]
    )
    assert found["status"] != 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_under_two_ranks(
    outcomes: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of its own: one may go while the other waits for it."""
    remount(small_disk, "size=4m,nr_inodes=2000")
    manifest = Path(outcomes["manifest"])
    place = (f"output={small_disk / 'out'}", f"cache.path={manifest.parent / 'out' / 'cache'}")
    command = distill_command(manifest, *SETS, "distill.parallel=fsdp", *place)
    support = Path(__file__).resolve().parents[1] / "support"
    path = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", path)
    arguments = command[command.index("distill") :]
    processes = start_ranks([sys.executable, "-P", __file__, "fill", str(small_disk), *arguments], 2)
    try:
        output = "".join(process.communicate(timeout=300)[0] for process in processes)
    finally:
        kill(processes)
    assert [process.returncode for process in processes] == [2, 2], output
    run = small_disk / "out" / "distill" / "student"
    assert re.search(rf"^ddk-pipe: {run}\S*: no space left on the disk; free some", output, re.MULTILINE), (
        output
    )
    # the third was perhaps under way in the background when the disk was full
    assert "Traceback" not in output and checkpoints_of(run) in ([2], [3])
    (small_disk / "filler").unlink()
    finish(start_ranks(command, 2))
    assert_same_bits(run, Path(outcomes["whole"]["run"]))


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill_disk(Path(sys.argv[2]), sys.argv[3:])
    else:
        run_rank(Path(sys.argv[1]), Path(sys.argv[2]))
