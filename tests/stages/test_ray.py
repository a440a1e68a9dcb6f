"""The Ray engine on two nodes of one machine: a worker killed, a node lost, and nothing lost with them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from cuda_questions import environment, noted_in, run
from openers import Fails
from same_bytes import groups, shard_contents
from tiny import MakeProject, break_weights
from typer.testing import CliRunner

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.text.sources import parts
from ddk_pipe.stages.cache_teacher import Request, cache_teacher
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.common.machine import BEFORE_CUDA
from ddk_pipe.stages.prepare import prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
STORE_BYTES = 100 << 20


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node and one more, of one CPU each; RAY_ADDRESS names it. Its workers can import tests/support."""
    support = str(Path(__file__).resolve().parents[1] / "support")
    monkeypatch.setenv("PYTHONPATH", support, prepend=os.pathsep)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.second = made.add_node(**node)
    made.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the nodes of a cluster that is started after this note who asks for a GPU."""
    for name in BEFORE_CUDA:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(tmp_path / "questions").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "questions"


def actors() -> list[psutil.Process]:
    """Processes of our actors."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::Actor")
    ]


class Events:
    """Follows a status stream, and acts once so many shards are done."""

    def __init__(self, path: Path, actions: dict[int, Any]) -> None:
        self.path, self.actions, self.ended = path, dict(actions), threading.Event()
        self.acted: list[int] = []
        self.thread = threading.Thread(target=self._follow)

    def _follow(self) -> None:
        while not self.ended.is_set():
            done = self.done()
            for number in [number for number in self.actions if number <= done]:
                self.actions.pop(number)()
                self.acted.append(done)
            time.sleep(0.05)

    def done(self) -> int:
        return sum(event["event"] == "shard" for event in self.all())

    def all(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def test_a_worker_killed_and_a_node_lost(
    make_project: MakeProject, tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_project(cache={"shard_windows": 4})
    whole = load_project(path, ["output=whole"])
    cache_teacher(whole)
    project = load_project(path)
    status = tmp_path / "status.jsonl"
    nodes: set[int] = set()

    def kill() -> None:
        found = actors()
        nodes.update(process.ppid() for process in found)
        os.kill(found[0].pid, signal.SIGKILL)

    def lose_a_node() -> None:
        cluster.remove_node(cluster.second)

    with Events(status, {5: kill, 15: lose_a_node}) as events:
        outcome = cache_teacher(project, Request(engine="ray", status=status))
    assert len(events.acted) == 2 and len(nodes) == 2, "both happened, and the actors were on two nodes"
    cache, total = tmp_path / "out" / "cache", outcome.shards_done
    assert shard_contents(cache) == shard_contents(tmp_path / "whole" / "cache")
    finished = [event["shard"] for event in events.all() if event["event"] == "shard"]
    assert len(finished) == len(set(finished)), "no shard is reported twice"
    assert total <= len(shard_contents(cache)) <= len(groups(cache))
    said = capsys.readouterr().err
    assert "Ray actors" in said and "dashboard" in said and "logs under" in said
    again = cache_teacher(project, Request(engine="ray"))
    assert again.shards_done == 0 and "the teacher was not loaded" in capsys.readouterr().err


def test_nan_on_an_actor_stops_the_run(
    make_project: MakeProject, tmp_path: Path, tiny_teacher: Path, cluster: Any
) -> None:
    broken = break_weights(tiny_teacher, tmp_path / "broken")
    project = load_project(make_project(), [f"teacher.model={broken}"])
    with pytest.raises(DdkError, match=rf"window \S+: .* NaN or infinity \(model {broken}\)"):
        cache_teacher(project, Request(engine="ray", workers=1))
    assert not groups(tmp_path / "out" / "cache")


def test_an_engine_that_fails_on_an_actor(
    make_project: MakeProject,
    tmp_path: Path,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Other shards are at the same actor then, and fail alike: nobody hears of them."""
    path, words = make_project(), "CUDA out of memory. Tried to allocate 2 GiB"
    with monkeypatch.context() as patch:
        patch.setattr(
            "ddk_pipe.stages.cache_teacher.plan.open_teacher", Fails(shard="code/train/1/", words=words)
        )
        result = CliRunner().invoke(app, ["cache-teacher", str(path), "--engine", "ray", "--workers", "1"])
    said = [line for line in result.output.splitlines() if line.startswith("ddk-pipe:")]
    assert result.exit_code == 2 and len(said) == 1
    assert f" in float32 ({words}); lower teacher.batch_windows" in said[0]
    time.sleep(2)  # for Ray to print what it thinks unheard
    assert "Traceback" not in result.output + capfd.readouterr().err
    cache = tmp_path / "out" / "cache"
    assert len(groups(cache)) == len(shard_contents(cache)) < 20
    assert cache_teacher(load_project(path), Request(engine="ray", workers=1)).shards_done


def test_ray_not_installed(project_without_ray: Project) -> None:
    with pytest.raises(DdkError, match=r"Ray is not installed; pip install .*\[ray\]"):
        cache_teacher(project_without_ray, Request(engine="ray"))


@pytest.fixture
def project_without_ray(make_project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> Project:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest)
    )
    return load_project(make_project())


def test_an_actor_asks_for_no_gpu_before_vllm_can_start(
    make_project: MakeProject, questions: Path, cluster: Any, tmp_path: Path
) -> None:
    """The nodes were started without our variables."""
    asked = ["cache-teacher", make_project(), "--engine", "ray", "--set", "teacher.backend=vllm"]
    driver, said = run(*asked, notes=tmp_path / "driver", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert "the stand-in serves nobody" in said, said
    for each in [*driver, *noted_in(questions)]:
        assert each.variables == BEFORE_CUDA and not each.touched, each
    assert [each.event for each in noted_in(questions)].count("engine") >= 1


def test_a_corpus_in_parts(
    make_project: MakeProject, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are those of this process; a document that is wrong is named as here."""
    monkeypatch.setattr(parts, "FIRST_BYTES", 500)
    monkeypatch.setattr(parts, "MOST_BYTES", 500)
    lines = [json.dumps({"text": f"line {number} of some text"}) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    path = make_project(domains={"a": {"train": "a.jsonl"}})
    facts = [
        {split: found.facts.digest for split, found in prepared["a"].items()}
        for prepared in (
            prepare(load_project(path, ["output=whole"])),
            prepare(load_project(path), engine="ray", workers=2),
        )
    ]
    assert facts[0] == facts[1]
    assert not (tmp_path / "out/tokens/a/parts").exists()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "nonsense", *lines]))
    with pytest.raises(DdkError, match=r"a\.jsonl:301: not JSON"):
        prepare(load_project(path), engine="ray", workers=2)
