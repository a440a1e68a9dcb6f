"""Writers that die: nothing that was committed is lost, nothing else is visible, a restart finishes the work."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from caches import fill, groups, open_writer, write_shard
from faults import (
    FIRST,
    SECOND,
    Judge,
    killed,
    run_command,
    small_spec,
    start,
    write_pending,
    write_step_by_step,
)
from tiny import write_project

from ddk_pipe.pipeline.cache import Shard, verify
from ddk_pipe.pipeline.cache.leftovers import STALE_SECONDS
from ddk_pipe.pipeline.storage import LocalFolder
from ddk_pipe.stages.common import grace_seconds

KILLS = 20


@pytest.mark.slow
def test_kill_9_at_random_moments(judge: Judge, tmp_path: Path) -> None:
    """Until 20 kills have hit a process at work; after each one the cache is compared with the undisturbed one."""
    rng = random.Random(7)
    kills, caches = 0, 0
    while kills < KILLS:
        folder = LocalFolder(tmp_path / str(caches))
        caches += 1
        before = 0
        while before < len(judge.windows):
            process, connection = start(write_pending, folder, small_spec())
            connection.recv()
            time.sleep(rng.uniform(0.0, 0.25))
            process.kill()
            kills += killed(process)
            if folder.exists("cache.json"):
                now = judge.committed(folder)
                assert now >= before, "a committed shard is lost"
                before = now
        judge.complete(folder)
        assert not verify(folder).bad


def steps_of(folder: LocalFolder, shard: Shard) -> list[str]:
    process, connection = start(write_step_by_step, folder, small_spec(), shard, None)
    steps: list[str] = connection.recv()
    process.join(60)
    return steps


def new_cache(path: Path) -> LocalFolder:
    """One committed shard; the next one is to be written."""
    folder = LocalFolder(path)
    write_shard(open_writer(folder, small_spec()), FIRST)
    return folder


def die_before(folder: LocalFolder, step: int) -> None:
    process, connection = start(write_step_by_step, folder, small_spec(), SECOND, step)
    assert killed(process), f"survived step {step}"
    connection.close()


@pytest.mark.slow
def test_kill_9_before_every_step_of_a_commit(judge: Judge, tmp_path: Path) -> None:
    """Every change of the file system from the end of the arrays on, and every tenth before."""
    begun = new_cache(tmp_path / "begun").path
    shutil.copytree(begun, tmp_path / "whole")
    steps = steps_of(LocalFolder(tmp_path / "whole"), SECOND)
    publish = step_named(steps, "os.rename", "train/0")
    assert len(steps) - publish >= 5
    for step in [*range(0, publish, 10), *range(publish, len(steps))]:
        shutil.copytree(begun, tmp_path / str(step))
        folder = LocalFolder(tmp_path / str(step))
        die_before(folder, step)
        committed = judge.committed(folder)
        assert committed == (4 if folder.exists(SECOND.record) else 2)
        if committed == 2:
            write_shard(open_writer(folder, small_spec()), SECOND)
            assert len(groups(folder, SECOND)) == 1, "the winner removes what the dead writer published"
        assert judge.committed(folder) == 4
        assert not verify(folder).bad


def step_named(steps: list[str], start: str, part: str) -> int:
    return next(at for at, step in enumerate(steps) if step.startswith(start) and part in step)


def test_death_between_publishing_and_the_record(judge: Judge, tmp_path: Path) -> None:
    steps = steps_of(new_cache(tmp_path / "whole"), SECOND)
    folder = new_cache(tmp_path / "cache")
    die_before(folder, step_named(steps, "os.link", "00001.json"))
    assert judge.committed(folder) == 2 and len(groups(folder, SECOND)) == 1
    fill(folder, small_spec())
    assert len(groups(folder, SECOND)) == 1, "the winner removes what a dead writer published"
    judge.complete(folder)


def test_death_between_the_record_and_the_cleanup(judge: Judge, tmp_path: Path) -> None:
    """Two writers die: one after publishing, the next after its record, so nobody has removed the first one's group."""
    steps = steps_of(new_cache(tmp_path / "whole"), SECOND)
    folder = new_cache(tmp_path / "cache")
    record = step_named(steps, "os.link", "00001.json")
    for step in (record, record + 1):
        die_before(folder, step)
    assert judge.committed(folder) == 4 and len(groups(folder, SECOND)) == 2
    fill(folder, small_spec())
    report = verify(folder, repair=True)
    assert report.sound and len(groups(folder, SECOND)) == 1
    judge.complete(folder)


def test_what_killed_writers_leave_is_swept(judge: Judge, tmp_path: Path) -> None:
    """Half-built shards and half-written records: invisible at once, removed an hour later."""

    steps = steps_of(new_cache(tmp_path / "whole"), SECOND)
    folder = new_cache(tmp_path / "cache")
    for step in (20, step_named(steps, "os.link", "00001.json")):
        die_before(folder, step)
    partials = [path for path in folder.path.rglob("*.partial") if path.parent.suffix != ".partial"]
    assert len(partials) >= 3
    assert judge.committed(folder) == 2
    fill(folder, small_spec())
    assert not verify(folder, repair=True).removed, "a writer may be at work on them"
    for path in (found for partial in partials for found in [*partial.rglob("*"), partial]):
        os.utime(path, (0, time.time() - STALE_SECONDS - 60))
    assert len(verify(folder, repair=True).removed) == len(partials)
    assert not list(folder.path.rglob("*.partial"))
    judge.complete(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_command_killed_and_stopped(tiny_teacher: Path, tmp_path: Path) -> None:
    """`ddk-pipe cache-teacher` by SIGKILL and SIGTERM in turn at random moments, until 20 have hit it at work.

    Wherever it dies: what was committed stays, and in the end the cache equals the undisturbed run's.
    """
    calm = project_in(tmp_path / "calm", tiny_teacher)
    assert blow(calm, signal.SIGKILL, shards=1000, wait=0.0) == 0
    judge = Judge(cache_of(calm))
    rng = random.Random(5)
    blows: list[int] = []
    caches = 0
    while len(blows) < KILLS:
        manifest = project_in(tmp_path / str(caches), tiny_teacher)
        caches += 1
        before, status = 0, 1
        while status:
            number = (signal.SIGKILL, signal.SIGTERM)[len(blows) % 2]
            status = blow(manifest, number, shards=rng.randrange(3), wait=rng.uniform(0.0, 0.4))
            if status:
                assert status in (-number, 128 + number), "ended by the signal, not by a failure"
                blows.append(status)
            if cache_of(manifest).exists("cache.json"):
                now = judge.committed(cache_of(manifest))
                assert now >= before, "a committed shard is lost"
                before = now
        judge.complete(cache_of(manifest))
        assert verify(cache_of(manifest)).sound
    assert 128 + signal.SIGTERM in blows, "some were told to stop while at work, and did so in order"


def project_in(folder: Path, teacher: Path) -> Path:
    folder.mkdir()
    return write_project(folder, teacher, cache={"shard_windows": 16})


def cache_of(manifest: Path) -> LocalFolder:
    return LocalFolder(manifest.parent / "out" / "cache")


def blow(manifest: Path, number: int, *, shards: int, wait: float) -> int:
    """Run the command in a process of its own, hit it so many shards and seconds later; its exit status."""
    process, connection = start(run_command, ["cache-teacher", str(manifest)])
    connection.recv()
    until = records(cache_of(manifest)) + shards
    while process.is_alive() and records(cache_of(manifest)) < until:
        time.sleep(0.01)
    process.join(wait)
    if process.is_alive():
        os.kill(process.pid or 0, number)
    process.join(grace_seconds() + 5)
    assert process.exitcode is not None, "it did not end in time"
    return process.exitcode


def records(folder: LocalFolder) -> int:
    """Committed shards."""
    return len(list(folder.path.glob("*/*/*.json")))
