"""Several teachers in processes of their own."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from openers import DiesOnce, Refuses
from same_bytes import groups, shard_contents
from tiny import MakeProject

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.stages.cache_teacher import Request, cache_teacher, local


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    return load_project(make_project())


def cache_of(project: Project) -> Path:
    return project.output / "cache"


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(
    project: Project, cached_output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed with a shard at its teacher, others perhaps half written: a third process is started for them."""
    real_start, started, note = local._start, list[Any](), tmp_path / "killed"

    def start(*arguments: Any) -> Any:
        started.append(real_start(*arguments))
        return started[-1]

    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(
        "ddk_pipe.stages.cache_teacher.plan.open_teacher", DiesOnce(shard="code/train/1/", note=note)
    )
    cache_teacher(project, Request(workers=2))
    ends = {worker.process.pid: worker.process.exitcode for worker in started}
    assert len(ends) == 3 and ends.pop(int(note.read_text())) == -signal.SIGKILL
    assert None not in ends.values(), "nobody is left behind"
    contents = shard_contents(cache_of(project))
    assert contents == shard_contents(cached_output / "cache")
    assert len(groups(cache_of(project))) >= len(contents)


@pytest.mark.slow
def test_workers_that_cannot_work_say_why(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_pipe.stages.cache_teacher.plan.open_teacher", Refuses("no room for the teacher"))
    with pytest.raises(DdkError, match="no room for the teacher; none"):
        cache_teacher(project, Request(workers=2))


def test_workers_have_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in local._places(2, 2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in local._places(2, 1)] == ["5", "7"]
    with pytest.raises(DdkError, match="--workers 3 with 1 GPUs each, and there are 2"):
        local._places(3, 1)
