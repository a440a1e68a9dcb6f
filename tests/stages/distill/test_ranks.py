"""The loop's own gradients under DDP and FSDP2 on two gloo ranks, against one process with the whole batch.

Two processes run this file as a script, once for all cases. Chats make the numbers of labels uneven; two micro
batches a rank make the ranks exchange gradients only in the last.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import finish, start_ranks
from tiny import MakeProject, write_jsonl, write_project
from torch.distributed.tensor import DTensor

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.windows import steps_of_windows
from ddk_pipe.stages.distill.world import World, join_world

RANKS, WINDOWS = 2, 8
BOUND = 1e-6  # relative, of every parameter's gradient; float32
CASES = {
    f"{parallel}, {'tied' if tied else 'untied'}": (parallel, tied)
    for parallel in ("ddp", "fsdp")
    for tied in (True, False)
}


def project_of(manifest: str, parallel: str, tied: bool) -> Project:
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": tied,
    }
    sets = [f"distill.parallel={parallel}", f"student={json.dumps({'config': config})}"]
    return load_project(Path(manifest), sets)


def gradients(project: Project, world: World) -> dict[str, Any]:
    """Of the first step, whole, by name; and this rank's labels."""
    parts = Parts(project, world)
    position = Position(0, 0.0, [0.5, 0.5], [0.5, 0.5], parts.sampler.state_dict(), "")
    data = next(steps_of_windows(parts, position))
    labels = [len(batch.rows.live) for batch in data.batches]
    total = float(sum(sum(own) for own in world.gather(labels)))
    assert float(parts.stepper._labels(data.batches)) == total
    sums = world.sum_on_device(parts.stepper._backward(0, data.batches, total, 0.2))
    found = {}
    for name, parameter in parts.student.named_parameters():
        assert parameter.grad is not None, name
        sharded = isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return {"labels": sum(labels), "loss": float(sums[0]) / total, "gradients": found, "sharded": sharded}


def run_rank(manifest: str, out: str) -> None:
    torch.set_num_threads(1)
    outcome = {}
    with join_world() as world:
        for name, (parallel, tied) in CASES.items():
            project = project_of(manifest, parallel, tied)
            alone, mine = gradients(project, World()), gradients(project, world)
            outcome[name] = {
                "labels": world.gather(mine["labels"]),
                "whole": alone["labels"],
                "loss": abs(mine["loss"] / alone["loss"] - 1),
                "sharded": mine["sharded"],
                "errors": {
                    name: float((mine["gradients"][name] - true).norm() / true.norm())
                    for name, true in alone["gradients"].items()
                },
            }
        if world.leads:
            Path(out).write_text(json.dumps(outcome))
        dist.barrier()
        os._exit(0)  # gloo's threads can abort a process while it is taken down


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {i}? " * (1 + i % 5)},
                {"role": "assistant", "content": f"It is {i + 1}."},
            ]
        }
        for i in range(60)
    ]
    write_jsonl(folder / "chat.jsonl", chats)
    manifest = write_project(
        folder,
        tiny_teacher,
        distill={"batch_tokens": WINDOWS * 32, "micro_batch_windows": 2, "interval_steps": 2, "steps": 2},
    )
    values = json.loads(manifest.read_text())
    values["domains"] = {"chat": {"train": "chat.jsonl"}, "plays": {"train": "text/plays.jsonl"}}
    manifest.write_text(json.dumps(values))
    cache_teacher(load_project(manifest))
    command = [sys.executable, "-P", __file__, str(manifest), str(folder / "out.json")]
    support = Path(__file__).resolve().parents[2] / "support"
    path = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        finish(start_ranks(command, RANKS))
    outcome: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_loop_are_those_of_one_process(case: str, outcomes: dict[str, Any]) -> None:
    found = outcomes[case]
    assert found["labels"][0] != found["labels"][1]  # uneven, or one denominator for all would not be tested
    assert sum(found["labels"]) == found["whole"]
    assert found["sharded"] == case.startswith("fsdp")
    assert found["loss"] <= BOUND
    assert not {name: error for name, error in found["errors"].items() if not error <= BOUND}


def test_windows_that_do_not_divide_are_refused(make_project: MakeProject) -> None:
    project = load_project(make_project(), ["distill.batch_tokens=96"])
    with pytest.raises(
        DdkError, match="3 windows a step do not divide among 2 processes; set batch_tokens to a"
    ):
        Parts(project, World(rank=0, size=2))


if __name__ == "__main__":
    run_rank(sys.argv[1], sys.argv[2])
