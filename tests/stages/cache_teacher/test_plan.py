"""What is known and refused before a weight is loaded: vocabularies, tokenizers, a model's own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same_bytes import shard_contents
from tiny import MakeProject, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import CacheReader
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.text import VALIDATION
from ddk_pipe.stages.cache_teacher import Request, cache_teacher, estimate
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.distill import distill

# --- vocabularies ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_padded_head_is_cut_before_the_softmax(make_project: MakeProject, tmp_path: Path) -> None:
    """448 rows of the output layer, 385 ids of the tokenizer, a student with 401 rows."""
    padded = tmp_path / "padded"
    ids = len(make_tokenizer(padded).get_vocab())
    make_model(padded, vocab_size=448)
    student: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 401,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    path = make_project(student={"config": student}, cache={"shard_windows": 16, "scheme": "topk", "k": 8})
    project = load_project(path, [f"teacher.model={padded}"])
    cache_teacher(project)
    reader = CacheReader(project.cache, 1.0)
    assert reader.spec.vocab_size == ids < student["vocab_size"]
    window = reader.read("code", VALIDATION, 0)
    assert int(window.targets.ids.max()) < ids
    model = AutoModelForCausalLM.from_pretrained(padded, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(window.tokens)[None]).logits[0]
    labels = torch.from_numpy(window.labels)
    live = labels >= 0
    cut, whole = (
        torch.log_softmax(part, 1)[live].gather(1, labels[live, None])[:, 0]
        for part in (logits[:, :ids], logits)
    )
    there = torch.as_tensor(np.asarray(window.label_logprobs))[live]
    assert torch.allclose(there, cut, atol=5e-4) and not torch.allclose(there, whole, atol=5e-4)
    assert distill(project)["steps"] == 6


def test_a_cache_is_of_rounded_logits_or_of_others(make_project: MakeProject) -> None:
    """Made in 16 bits before teacher.logits was there, it is read, and goes on with `model` only."""
    path, short = make_project(), ["cache.scheme=topk", "teacher.dtype=bfloat16"]
    whole = load_project(path, ["output=float32"])
    cache_teacher(whole)
    assert "logits" not in CacheReader(whole.cache, 1.0).spec.teacher, "one fingerprint with older caches"
    older = load_project(path, [*short, "teacher.logits=model"])
    cache_teacher(older, Request(limit=1))
    assert "logits" not in CacheReader(older.cache, 1.0).spec.teacher
    with pytest.raises(DdkError, match=r"another teacher \(logits None there, float32 here\)"):
        cache_teacher(load_project(path, short))
    newer = load_project(path, [*short, "output=newer"])
    cache_teacher(newer, Request(limit=1))
    assert CacheReader(newer.cache, 1.0).spec.teacher["logits"] == "float32"


def test_a_tokenizer_with_other_tokens_is_refused_in_numbers(
    make_project: MakeProject, tmp_path: Path
) -> None:
    other = make_tokenizer(tmp_path / "other", vocab_size=300)
    path = make_project()
    size = len(AutoTokenizer.from_pretrained(load_project(path).teacher_model).get_vocab())
    with pytest.raises(
        DdkError, match=rf"{len(other.get_vocab())} ids, the teacher's has {size}; id \d+ is "
    ):
        cache_teacher(load_project(path, ["tokenizer=other"]))


def with_added_tokens(folder: Path) -> tuple[Path, int]:
    """A teacher with two rows of padding, three tokens added to its tokenizer; the folder and the rows."""
    tokenizer = make_tokenizer(folder)
    size = len(tokenizer.get_vocab()) + 2
    make_model(folder, vocab_size=size)
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save_pretrained(folder)
    return folder, size


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["cache", "online"])
def test_tokens_that_the_teacher_lacks_do_no_harm_outside_the_text(
    make_project: MakeProject, tmp_path: Path, targets: str
) -> None:
    folder, size = with_added_tokens(tmp_path / "added")
    options = [f"teacher.model={folder}", f"distill.targets={targets}"]
    project = load_project(make_project(), options)
    if targets == "cache":
        assert estimate(project, windows=2).rows[0].entries_per_position > 1
        cache_teacher(project)
        assert CacheReader(project.cache, 1.0).spec.vocab_size == size
    assert distill(project)["steps"] == 6
    assert AutoModelForCausalLM.from_pretrained(project.run / "student").lm_head.weight.shape[0] == size


def test_tokens_that_the_teacher_lacks_are_refused_in_the_text(
    make_project: MakeProject, tmp_path: Path
) -> None:
    folder, size = with_added_tokens(tmp_path / "added")
    path = make_project()
    with (path.parent / "text/plays.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"<one><two> act {i} <three> and out"}) + "\n" for i in range(40))
    project = load_project(path, [f"teacher.model={folder}"])
    said = rf"domains.plays: its train text holds '<three>' \(id {size}\) \d+ times, the teacher knows {size} ids"
    with pytest.raises(DdkError, match=said):
        cache_teacher(project)
    assert not project.cache.exists("cache.json")
    with pytest.raises(DdkError, match=said):
        estimate(project, windows=2)
    with pytest.raises(DdkError, match=said):
        distill(load_project(path, [f"teacher.model={folder}", "distill.targets=online"]))


@pytest.mark.slow
def test_a_vocabulary_of_262_144(make_project: MakeProject, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    make_tokenizer(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary |= {f"<unused{index}>": index for index in range(len(vocabulary), 262_144)}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    make_model(folder, vocab_size=262_208)  # 64 rows of padding
    path = make_project(cache={"shard_windows": 8, "temperatures": [1.0, 2.0]})
    named = f"teacher.model={folder}"
    result = CliRunner().invoke(app, ["cache-teacher", str(path), "--set", named, "--limit", "3"])
    assert result.exit_code == 0, result.stderr
    reader = CacheReader(load_project(path, [named]).cache, 1.0)
    assert reader.spec.vocab_size == 262_144
    window = reader.read("code", VALIDATION, 0)
    assert int(window.targets.ids.max()) > 1 << 16
    window.targets.validate(262_144)


# --- code that comes with a model -----------------------------------------------------------------


def test_code_of_a_model_runs_only_if_the_manifest_says_so(
    make_project: MakeProject, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder, trace = tmp_path / "custom", tmp_path / "ran"
    shutil.copytree(tiny_teacher, folder)
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(trace)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    path, named = make_project(), f"teacher.model={folder}"
    result = CliRunner().invoke(app, ["cache-teacher", str(path), "--set", named, "--limit", "1"])
    assert result.exit_code == 2 and "trust_remote_code" in result.stderr and not trace.exists()
    cache_teacher(load_project(path, [named, "teacher.trust_remote_code=true"]), Request(limit=1))
    assert trace.exists() and len(shard_contents(path.parent / "out" / "cache")) == 1
