"""A run's folder met again after what it was made of has changed: refused by name, finished or interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, write_jsonl

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.identity.digests import Digests
from ddk_pipe.stages.distill.run import Run

SHORT = {"steps": 3, "batch_tokens": 64, "interval_steps": 2, "validation_windows": 1, "checkpoint_steps": 1}
Rewrite = Callable[..., None]


def interrupted(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the run at a checkpoint of its first step."""
    real = Run._step

    def signalled(self: Run, position: Any, data: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, position, data)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_step", signalled)
        with pytest.raises(KeyboardInterrupt):
            distill(project)
    assert (project.run / "checkpoints" / "step-00000001").is_dir()


@pytest.fixture(params=["finished", "interrupted"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stand(how: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Project], None]:
    """Brings a run to where it is met again."""

    def bring(project: Project) -> None:
        if how == "finished":
            distill(project)
        else:
            interrupted(project, monkeypatch)

    return bring


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def refused(project: Project, *words: str) -> None:
    """One line that holds these words; the folder is as it was."""
    before = content(project.run)
    with pytest.raises(DdkError) as refusal:
        distill(project)
    line = str(refusal.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert content(project.run) == before


def rewritten(manifest: Path, **sections: Any) -> Project:
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, **sections}))
    return load_project(manifest)


@pytest.fixture
def student(tmp_path: Path, tiny_teacher: Path) -> Path:
    """A model to continue from, with the teacher's tokenizer."""
    folder = tmp_path / "base"
    tokenizer = make_tokenizer(folder)
    return make_model(folder, vocab_size=len(tokenizer.get_vocab()), seed=3, layers=2)


@pytest.fixture
def other_teacher(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    tokenizer = make_tokenizer(folder)
    return make_model(folder, vocab_size=len(tokenizer.get_vocab()), seed=9)


def change_weights(folder: Path) -> None:
    """Other values in the same file: its size stays."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, path, metadata={"format": "pt"})


# --- teacher and cache ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keep_layers", "model"])
def test_another_teacher_is_refused_by_name(
    cached: Path, stand: Callable[[Project], None], other_teacher: Path, student: Path, kind: str
) -> None:
    starts = {"model": str(student)} if kind == "model" else {"keep_layers": [0]}
    project = rewritten(cached, distill=SHORT, student=starts)
    stand(project)
    # before it is cached, and then from a cache of its own in the same place
    changed = rewritten(cached, teacher={"model": str(other_teacher), "backend": "hf"})
    refused(changed, "teacher.model", "is not the teacher that the cache", "teacher weights", "cache-teacher")
    shutil.rmtree(cached.parent / "out" / "cache")
    cache_teacher(changed)
    refused(
        changed,
        "out/distill/student: holds a run from another cache",
        "teacher weights",
        ", now ",
        "distill.name",
    )


@pytest.mark.slow
def test_another_cache_is_refused_by_name_and_the_same_elsewhere_is_not(
    cached: Path, stand: Callable[[Project], None], how: str
) -> None:
    stand(rewritten(cached, distill=SHORT))
    other = rewritten(cached, cache={"path": "coarse", "tau": 0.3, "shard_windows": 16})
    cache_teacher(other)
    refused(other, "holds a run from another cache (selection.tau 0.02, now 0.3)")
    shutil.copytree(cached.parent / "out" / "cache", cached.parent / "moved")
    moved = rewritten(cached, cache={"path": "moved", "shard_windows": 16})
    assert distill(moved)["steps"] == 3


@pytest.mark.slow
def test_a_cache_of_other_text_is_refused_and_one_with_more_domains_is_not(
    cached: Path, stand: Callable[[Project], None]
) -> None:
    domains = {name: {"train": f"text/{name}.jsonl"} for name in ("code", "plays")}
    stand(rewritten(cached, distill=SHORT))
    write_jsonl(cached.parent / "text" / "more.jsonl", [{"text": f"more and more {i}"} for i in range(200)])
    cache_teacher(rewritten(cached, domains={**domains, "more": {"train": "text/more.jsonl"}}))
    same = rewritten(cached, domains=domains)
    reordered = rewritten(cached, domains=dict(reversed(domains.items())))
    refused(reordered, "holds a run with its domains in another order")
    write_jsonl(
        cached.parent / "text" / "plays.jsonl", [{"text": f"other lines {i} " * 9} for i in range(60)]
    )
    changed = rewritten(cached, domains=domains, cache={"path": "again", "shard_windows": 16})
    cache_teacher(changed)
    refused(changed, "holds a run on other tokens", "tokens.plays/train.digest")
    rewritten(cached, domains=domains, cache={"shard_windows": 16})
    assert distill(same)["steps"] == 3


@pytest.mark.slow
def test_tokens_and_teacher_of_online_targets(
    cached: Path, stand: Callable[[Project], None], how: str, other_teacher: Path, student: Path
) -> None:
    online = {**SHORT, "targets": "online"}
    project = rewritten(cached, distill=online, student={"model": str(student)})
    stand(project)
    other = rewritten(cached, teacher={"model": str(other_teacher), "backend": "hf"})
    refused(other, "holds a run beside another teacher (teacher weights ")
    rounded = {**project.manifest.teacher.model_dump(), "dtype": "bfloat16"}
    refused(
        rewritten(cached, teacher=rounded),
        "beside a teacher of another dtype (teacher.dtype auto, now bfloat16)",
    )
    rewritten(cached, teacher=project.manifest.teacher.model_dump())
    write_jsonl(
        cached.parent / "text" / "plays.jsonl", [{"text": f"other lines {i} " * 9} for i in range(60)]
    )
    if how == "finished":  # it would not read the text again
        assert distill(project)["steps"] == 3
        from ddk_pipe.stages.prepare import prepare

        prepare(project)
    refused(project, "holds a run on other tokens", "tokens.plays/")


# --- what the student starts from ---------------------------------------------------------------------


@pytest.mark.slow
def test_other_weights_under_the_same_path(
    cached: Path, stand: Callable[[Project], None], student: Path
) -> None:
    project = rewritten(cached, distill=SHORT, student={"model": str(student)})
    stand(project)
    path = student / "model.safetensors"
    before, content_before = path.stat(), path.read_bytes()
    change_weights(student)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` of another file would have it
    refused(project, "holds a run from other first weights (what the student starts from ", ", now ")
    path.write_bytes(content_before)
    assert distill(project)["steps"] == 3


@pytest.mark.slow
def test_another_configuration_in_the_same_file(cached: Path, stand: Callable[[Project], None]) -> None:
    values = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    path = cached.parent / "small.json"
    path.write_text(json.dumps(values))
    project = rewritten(cached, distill=SHORT, student={"config": "small.json"})
    stand(project)
    path.write_text(json.dumps({**values, "intermediate_size": 24}))
    refused(project, "holds a run from other first weights")
    path.write_text(json.dumps(values, indent=4, sort_keys=True))  # written otherwise, the same values
    assert distill(project)["steps"] == 3


def test_a_finished_run_whose_parts_are_gone_is_finished_and_says_so(
    cached: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = rewritten(cached, distill=SHORT, student={"model": str(student)})
    distill(project)
    shutil.rmtree(student)
    assert distill(project)["steps"] == 3
    said = capsys.readouterr().err
    assert "not compared: what the student started from" in said
    shutil.rmtree(cached.parent / "out" / "cache")
    assert distill(load_project(cached))["steps"] == 3
    assert "not compared: the cache, the tokens, what the student started from" in capsys.readouterr().err


# --- the record itself ----------------------------------------------------------------------------------


def test_an_unfinished_run_that_does_not_say_what_it_is_made_of(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = rewritten(cached, distill=SHORT)
    interrupted(project, monkeypatch)
    identity = project.run / "identity.json"
    kept = identity.read_bytes()
    identity.write_bytes(kept[:-40])
    refused(project, "identity.json: damaged", "delete that folder")
    identity.unlink()
    refused(project, "does not say what it was made of (identity.json is not there)", "distill.name")
    identity.write_bytes(kept)
    assert distill(project)["steps"] == 3


def test_a_checkpoint_of_another_run_is_refused(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved in by hand, or by a disk that was restored in part."""
    project = rewritten(cached, distill=SHORT)
    interrupted(project, monkeypatch)
    path = project.run / "checkpoints" / "step-00000001" / "position.json"
    position = json.loads(path.read_bytes())
    path.write_bytes(durable.to_json({**position, "made_of": "0" * 32}))
    refused(project, "holds a checkpoint of another run (step 1)")


def test_a_finished_run_of_an_older_version(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its settings and its cache's fingerprint are in run.json; that the rest is not compared is said."""
    project = rewritten(cached, distill=SHORT)
    distill(project)
    (project.run / "identity.json").unlink()
    summary = json.loads((project.run / "run.json").read_bytes())
    del summary["student"]
    (project.run / "run.json").write_bytes(durable.to_json(summary))
    assert distill(project)["steps"] == 3
    assert (
        "was made before runs kept what they were made of: its cache alone was compared"
        in capsys.readouterr().err
    )
    refused(load_project(cached, ["distill.seed=4"]), "with other settings (distill.seed 0, now 4)")
    (project.run / "run.json").write_bytes(durable.to_json({**summary, "cache_fingerprint": "1" * 32}))
    refused(project, "holds a run from another cache (fingerprint 11111111, now ")


def test_settings_that_differ_are_named(cached: Path) -> None:
    project = rewritten(cached, distill=SHORT)
    distill(project)
    sets = ["distill.gamma=0.5", "distill.mixing=uniform", "distill.alpha=0.1", "distill.seed=1"]
    refused(
        load_project(cached, sets), "with other settings (", "distill.gamma 0.2, now 0.5", ", and 1 more)"
    )
    refused(load_project(cached, ["distill.steps=2"]), "(distill.steps 3, now 2)")
    assert distill(load_project(cached, ["distill.keep_last=2"]))["steps"] == 3  # what a run may change


def test_weights_are_read_once(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_teacher, folder)
    first = Digests()
    digest = first.of(folder)
    read: list[Path] = []
    real = durable.file_digest

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(durable, "file_digest", counted)
    again = Digests(first.known)
    assert again.of(folder) == digest and not read
    change_weights(folder)
    assert again.of(folder) != digest and read
