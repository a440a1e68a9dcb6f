"""A student in shards from its start: built on one process, the same bits on all, and its refusals heard by all.

Three processes run this file as a script, once for all cases.
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

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.distill.sharding import fill, taken_apart
from ddk_pipe.stages.distill.students import DistillStudent
from ddk_pipe.stages.distill.world import World, join_world, whole, wrap

RANKS = 3  # 401 rows do not divide among them
CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 401}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "intermediate_size": 32, "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "intermediate_size": 32, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 1},
    "gpt2": {"model_type": "gpt2", "n_positions": 32},
    "changed": {"model_type": "llama", "intermediate_size": 32},  # its configuration does not say how
}


def make(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SIZES, **CASES[name]}
    torch.manual_seed(3)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if name == "changed":
        lm.model.norm.bias = torch.nn.Parameter(torch.zeros(16))
    return lm


def outcome(name: str, world: World) -> dict[str, Any]:
    builds = []

    def build() -> Any:
        builds.append(name)
        return make(name)

    lm, tensors = taken_apart(world, build)
    wrapped = wrap(DistillStudent(lm), world, parallel="fsdp", dtype=torch.float32, device=CPU)
    if tensors is not None:
        fill(wrapped.student, CPU, world, tensors, prefix="lm.")
    truth = make(name)
    found = {
        each: whole(value.detach())
        for each, value in [*wrapped.student.lm.named_parameters(), *wrapped.student.lm.named_buffers()]
    }
    wanted = {**dict(truth.named_parameters()), **dict(truth.named_buffers())}
    return {
        "apart": tensors is not None,
        "builds": len(builds),
        "names": list(found) == list(wanted),
        "equal": all(torch.equal(found[each], wanted[each]) for each in wanted),
        "left": len(tensors or ()),
        "training": lm.training,
        "attention": lm.config._attn_implementation == truth.config._attn_implementation,
        "settings": lm.generation_config == truth.generation_config,
    }


def refusal(world: World) -> str:
    def build() -> Any:
        raise DdkError("student: no", hint="none")

    try:
        taken_apart(world, build)
    except DdkError as mistake:
        return str(mistake)
    return ""


def run_rank(out: str) -> None:
    torch.set_num_threads(1)
    with join_world() as world:
        outcomes = {name: world.gather(outcome(name, world)) for name in CASES}
        refused = world.gather(refusal(world))
        if world.leads:
            Path(out).write_text(json.dumps({"cases": outcomes, "refused": refused}))
        dist.barrier()
        os._exit(0)  # gloo's threads can abort a process while it is taken down


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    support = Path(__file__).resolve().parents[2] / "support"
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join(filter(None, [str(support), os.environ.get("PYTHONPATH")]))
        patch.setenv("PYTHONPATH", path)
        finish(start_ranks([sys.executable, "-P", __file__, str(out)], RANKS))
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_process_has_its_rows_of_what_the_leader_built(name: str, outcomes: dict[str, Any]) -> None:
    for rank, found in enumerate(outcomes["cases"][name]):
        apart = name != "changed"
        assert found.pop("builds") == (1 if rank == 0 or not apart else 0)
        assert found == {
            "apart": apart,
            "names": True,
            "equal": True,
            "left": found["left"] if rank == 0 else 0,
            "training": False,
            "attention": True,
            "settings": found["settings"] if rank else True,  # the leader saves
        }


@pytest.mark.slow
def test_what_the_leader_refuses_all_refuse(outcomes: dict[str, Any]) -> None:
    assert outcomes["refused"] == ["student: no; none"] * RANKS


if __name__ == "__main__":
    run_rank(sys.argv[1])
