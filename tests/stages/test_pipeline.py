"""All stages together on the tiny teacher: what comes out, what is skipped, what continues."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import MakeProject, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import CacheReader
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import target_entropy
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.storage import open_folder
from ddk_pipe.pipeline.targets import SparseTargets
from ddk_pipe.pipeline.text import TRAIN, VALIDATION, open_split
from ddk_pipe.stages.cache_teacher import cache_teacher
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.schedules import learning_rate
from ddk_pipe.stages.distill.sources import CacheSource
from ddk_pipe.stages.distill.students import build_student
from ddk_pipe.stages.inspect import inspect
from ddk_pipe.stages.prepare import prepare


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    return load_project(make_project())


@pytest.fixture
def with_cache(cached: Path) -> Project:
    """The same, its cache made already."""
    return load_project(cached)


def test_text_to_student(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = cache_teacher(project)
    assert outcome.shards_done > 4 and outcome.shards_skipped == 0 and outcome.bytes_per_position > 0
    summary = distill(project)
    run = project.run
    steps = pq.read_table(run / "steps.parquet").to_pylist()
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    validation = pq.read_table(run / "validation.parquet").to_pylist()
    assert [(row["step"], row["domain"]) for row in validation] == [
        (step, domain) for step in (0, 2, 4, 6) for domain in ("code", "plays")
    ]
    for step in (0, 2, 4, 6):
        assert sum(row["weight"] for row in validation if row["step"] == step) == pytest.approx(1)
    first, last = ([row["gap"] for row in validation if row["step"] == step] for step in (0, 6))
    assert np.mean(last) < np.mean(first)
    model = AutoModelForCausalLM.from_pretrained(run / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    assert model.config.num_hidden_layers == 2 and summary["parameters"] == model.num_parameters()
    inputs = tokenizer("The quick", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert (run / "student" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert not list(run.glob("checkpoints/*"))
    inspect(str(project.output))
    shown = capsys.readouterr().out
    for part in ("code/train", "finished", "bytes/position", "last weight"):
        assert part in shown, part


def test_everything_is_skipped_the_second_time(
    with_cache: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(with_cache)
    before = snapshot(with_cache.output)
    capsys.readouterr()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("ddk_pipe.stages.cache_teacher.plan.open_teacher", never)
    outcome = cache_teacher(with_cache)
    distill(with_cache)
    assert snapshot(with_cache.output) == before
    assert (outcome.shards_done, outcome.positions) == (0, 0)
    said = capsys.readouterr().err
    assert "the teacher was not loaded" in said and "is finished" in said and "already done" in said


def test_distilling_needs_no_teacher(with_cache: Project, tmp_path: Path, tiny_teacher: Path) -> None:
    manifest = json.loads((tmp_path / "manifest.yaml").read_text())
    tokenizer = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tokenizer)
    manifest |= {
        "teacher": {"model": "/nowhere"},
        "tokenizer": "tokenizer",
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        },
    }
    (tmp_path / "manifest.yaml").write_text(json.dumps(manifest))
    assert distill(load_project(tmp_path / "manifest.yaml"))["steps"] == 6


def test_teacher_ce_in_the_cache_is_the_models_own(with_cache: Project, tiny_teacher: Path) -> None:
    reader = CacheReader(with_cache.cache, 1.0)
    windows = [reader.read("code", VALIDATION, i) for i in range(reader.size("code", VALIDATION).windows)]
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    tokens = torch.from_numpy(np.stack([window.tokens for window in windows]))
    labels = torch.from_numpy(np.stack([window.labels for window in windows]))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten())
    assert -np.nanmean([window.label_logprobs for window in windows]) == pytest.approx(
        float(expected), abs=3e-4
    )


def test_student_equal_to_the_teacher_has_no_gap(with_cache: Project, tmp_path: Path) -> None:
    same = load_project(tmp_path / "manifest.yaml", ["student.keep_layers=[0, 1, 2]"])
    parts = Parts(same)
    assert parts.validation.run().student_ce == pytest.approx(parts.teacher_ce, abs=1e-3)


# --- prepare --------------------------------------------------------------------------------------


def test_prepare_is_content_addressed(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(project)
    before = snapshot(project.tokens)
    path = tmp_path / "text" / "code.jsonl"
    os.utime(path, (1, 1))  # touched, not changed
    capsys.readouterr()
    prepare(project)
    assert snapshot(project.tokens) == before
    assert capsys.readouterr().err.count("already done") == 2
    path.write_text(path.read_text() + json.dumps({"text": "one more document"}) + "\n")
    prepare(project)
    said = capsys.readouterr().err
    assert "prepare plays: already done" in said and "prepare code/train" in said


def test_validation_split_is_by_content_and_never_empty(project: Project, tmp_path: Path) -> None:
    splits = prepare(project)["code"]
    facts = {name: split.facts.documents for name, split in splits.items()}
    assert facts[TRAIN] + facts[VALIDATION] == 60 and facts[VALIDATION] >= 1
    rows = [json.loads(line) for line in (tmp_path / "text" / "code.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "text" / "code.jsonl", rows[::-1])  # another order, the same split
    assert prepare(project)["code"][VALIDATION].facts.documents == facts[VALIDATION]
    write_jsonl(tmp_path / "text" / "code.jsonl", [{"text": "first of two"}, {"text": "second of two"}])
    again = prepare(project)["code"]
    assert [again[name].facts.documents for name in (TRAIN, VALIDATION)] == [1, 1]


def test_named_validation_files(make_project: MakeProject, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "v.jsonl", [{"text": f"kept for validation {i}"} for i in (0, 1, 2, 2)])
    project = load_project(make_project(), ["domains.code={train: text/code.jsonl, validation: v.jsonl}"])
    splits = prepare(project)["code"]
    assert (splits[TRAIN].facts.documents, splits[VALIDATION].facts.documents) == (60, 3)


def test_chat_without_an_assistant(make_project: MakeProject, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    write_jsonl(tmp_path / "chat.jsonl", [chat, {"messages": [{"role": "user", "content": "again"}]}])
    project = load_project(make_project(), ["domains.code={train: chat.jsonl}"])
    with pytest.raises(DdkError, match="no token of its train text is a label"):
        prepare(project)


@pytest.mark.slow
def test_chat_data_goes_through_all_stages(make_project: MakeProject, tmp_path: Path) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {i}?"},
                {"role": "assistant", "content": f"It is {i + 1}."},
            ]
        }
        for i in range(40)
    ]
    write_jsonl(tmp_path / "chat.jsonl", chats)
    project = load_project(make_project(), ["domains.chat={train: chat.jsonl}"])
    cache_teacher(project)
    split = open_split(project.tokens / "chat" / TRAIN)
    assert 0 < split.facts.labels < split.facts.tokens / 2
    reader = CacheReader(project.cache, 1.0)
    window = reader.read("chat", TRAIN, 0)
    silent = torch.from_numpy(window.labels) < 0
    assert bool(silent.any()) and not bool((window.targets.ids[silent] >= 0).any())
    assert distill(project)["steps"] == 6


# --- stopping and continuing ----------------------------------------------------------------------


def start(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "ddk_pipe.stages.cli", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_cache_teacher_continues_after_a_signal(
    make_project: MakeProject, tmp_path: Path, how: signal.Signals
) -> None:
    path = make_project(cache={"shard_windows": 4})
    whole = load_project(path, ["output=whole"])
    cache_teacher(whole)
    cut = tmp_path / "out" / "cache"
    process = start("cache-teacher", path)
    wait_for(lambda: len(list(cut.glob("*/*/[0-9]*.json"))) >= 2, process)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    done = len(list(cut.glob("*/*/[0-9]*.json")))
    total = len(list((tmp_path / "whole" / "cache").glob("*/*/[0-9]*.json")))
    assert 2 <= done < total
    if how != signal.SIGKILL:
        status = {signal.SIGINT: 130, signal.SIGTERM: 143}[how]
        assert process.returncode == status and f"to continue: ddk-pipe cache-teacher {path}" in said
        assert not list(cut.rglob("*.partial"))
    cache_teacher(load_project(path))
    one, other = (CacheReader(folder, 1.0) for folder in (whole.cache, open_folder(cut)))
    for domain in ("code", "plays"):
        for window in range(one.size(domain, TRAIN).windows):
            a, b = one.read(domain, TRAIN, window), other.read(domain, TRAIN, window)
            assert np.array_equal(a.tokens, b.tokens) and a.targets.ids.equal(b.targets.ids)


def test_distill_continues_after_ctrl_c_as_if_it_had_never_stopped(
    with_cache: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(load_project(tmp_path / "manifest.yaml", ["distill.name=whole"]))
    real, calls = Run._step, []

    def step(self: Run, position: Any, *arguments: Any) -> Any:
        calls.append(position.step)
        if position.step == 2 and len(calls) < 4:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        return real(self, position, *arguments)

    monkeypatch.setattr(Run, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        distill(with_cache)
    distill(with_cache)
    assert calls == [0, 1, 2, 3, 4, 5]
    one, other = (tmp_path / "out" / "distill" / name for name in ("whole", "student"))
    timings = ("tokens_per_second", "data_wait_seconds")
    rows = [
        [
            {k: v for k, v in row.items() if k not in timings}
            for row in pq.read_table(run / f"{table}.parquet").to_pylist()
        ]
        for table in ("steps", "validation")
        for run in (one, other)
    ]
    assert rows[0] == rows[1] and rows[2] == rows[3]
    weights = [AutoModelForCausalLM.from_pretrained(run / "student").state_dict() for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_run_with_other_settings_is_not_overwritten(with_cache: Project, tmp_path: Path) -> None:
    distill(with_cache)
    before = snapshot(with_cache.run)
    with pytest.raises(DdkError, match="holds a run with other settings"):
        distill(load_project(tmp_path / "manifest.yaml", ["distill.gamma=0.7"]))
    assert snapshot(with_cache.run) == before


@pytest.mark.slow
def test_nan_loss_stops_before_the_weights_are_touched(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = load_project(make_project(), ["distill.optimizer.learning_rate=1e30", "distill.steps=40"])
    cache_teacher(project)
    with pytest.raises(DdkError, match=r"the loss is .* at step \d+"):
        distill(project)
    assert not (project.run / "run.json").exists()


# --- parts of the loop ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_are_equal_and_seeds_differ(with_cache: Project, tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        changed = load_project(tmp_path / "manifest.yaml", [f"distill.name={name}", f"distill.seed={seed}"])
        distill(changed)
        losses.append(pq.read_table(changed.run / "steps.parquet").column("loss").to_pylist())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", ["uniform", "natural", "ddk_unsmoothed", "doremi", "sheared", "gap_softmax", "learnability"]
)
def test_every_rule_runs(with_cache: Project, tmp_path: Path, rule: str) -> None:
    changed = load_project(tmp_path / "manifest.yaml", [f"distill.mixing={rule}", "distill.steps=3"])
    distill(changed)
    validation = pq.read_table(changed.run / "validation.parquet").to_pylist()
    if rule == "uniform":
        assert {row["weight"] for row in validation} == {0.5}
    if rule == "natural":
        reader = CacheReader(with_cache.cache, 1.0)
        sizes = [reader.size(domain, TRAIN).windows for domain in ("code", "plays")]
        assert validation[0]["weight"] == pytest.approx(sizes[0] / sum(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["threshold", "topk", "random"])
def test_every_scheme_trains(make_project: MakeProject, scheme: str) -> None:
    project = load_project(
        make_project(cache={"scheme": scheme, "shard_windows": 16, "temperatures": [1.0, 2.0]})
    )
    cache_teacher(project)
    distill(load_project(project.root / "manifest.yaml", ["distill.temperature=2.0"]))
    if scheme != "random":
        distill(load_project(project.root / "manifest.yaml", ["distill.name=r", "distill.direction=reverse"]))


@pytest.mark.slow
def test_a_renormalised_run_trains_on_heads_without_their_tail(make_project: MakeProject) -> None:
    project = load_project(make_project(cache={"scheme": "topk", "k": 4}), ["distill.tail=renormalise"])
    cache_teacher(project)
    source = CacheSource(project)
    window = source.reader.read(source.domains[0], TRAIN, 0)
    assert (window.targets.tail > float("-inf")).any()
    targets = source.read(0, 0).targets
    targets.validate()
    assert (targets.tail == float("-inf")).all()
    assert targets.logprobs.equal(window.targets.renormalised().logprobs)
    distill(project)


@pytest.mark.slow
def test_micro_batches_do_not_change_the_step(with_cache: Project, tmp_path: Path) -> None:
    losses = []
    for size in (1, 4):
        sets = [f"distill.name=m{size}", f"distill.micro_batch_windows={size}", "distill.steps=3"]
        changed = load_project(tmp_path / "manifest.yaml", sets)
        distill(changed)
        losses.append(pq.read_table(changed.run / "steps.parquet").column("loss").to_pylist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_gradient_skip_is_reproducible_and_near_the_exact_run(with_cache: Project, tmp_path: Path) -> None:
    losses = []
    for name, skip in (("exact", "null"), ("a", "1e-2"), ("b", "1e-2")):
        sets = [f"distill.name={name}", f"distill.gradient_skip={skip}"]
        changed = load_project(tmp_path / "manifest.yaml", sets)
        distill(changed)
        losses.append(pq.read_table(changed.run / "steps.parquet").column("loss").to_pylist())
    assert losses[1] == losses[2]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_learning_rate_shape(project: Project) -> None:
    options = project.manifest.distill.model_copy(update={"steps": 100})
    rates = [learning_rate(options, step) for step in range(100)]
    peak = options.optimizer.learning_rate
    assert rates[4] == pytest.approx(peak) and rates[0] == pytest.approx(peak / 5)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.1 * peak, rel=0.05)


def test_kept_layers_are_the_teachers(project: Project, tiny_teacher: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    student = build_student(project, vocab_size=385, seed=0)
    for kept, original in ((0, 0), (1, 2)):
        for one, other in zip(
            student.model.layers[kept].parameters(), teacher.model.layers[original].parameters(), strict=True
        ):
            assert torch.equal(one, other)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]


def test_target_entropy_turns_kl_into_cross_entropy() -> None:
    from ddk_pipe.pipeline.losses import sparse_kd_reference

    weights = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    targets = SparseTargets(
        ids=torch.tensor([[0, 2, 5], [3, -1, -1]], dtype=torch.int32),
        logprobs=weights.log(),
        tail=torch.full((2,), float("-inf")),
    )
    logits = torch.randn(2, 7, dtype=torch.float64)
    loss = sparse_kd_reference(logits, torch.tensor([1, 2]), targets, gamma=1.0)
    log_q = torch.log_softmax(logits, 1)
    expected = -(weights[0].double() * log_q[0, [0, 2, 5]]).sum() - log_q[1, 3]
    assert float(loss.kl) + target_entropy(targets) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.slow
def test_readme_path_for_a_new_user(tmp_path: Path, tiny_teacher: Path) -> None:
    """Two jsonl files and the ten lines of README, through every command."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- ten-line manifest -->")[1].split("```yaml\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) <= 10
    (tmp_path / "manifest.yaml").write_text(block)
    for name in ("notes", "mails"):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"text": f"{name} number {i}: some words to learn"} for i in range(80)],
        )
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    runner = CliRunner()
    sets = ["--set", "distill.steps=4", "--set", "seq_len=32", "--set", "student.keep_layers=[0, 1]"]
    for command in ("prepare", "cache-teacher", "distill"):
        result = runner.invoke(
            app, [command, str(tmp_path / "manifest.yaml"), "--set", "teacher.backend=hf", *sets]
        )
        assert result.exit_code == 0, result.stderr
    result = runner.invoke(app, ["inspect", str(tmp_path / "out")])
    assert result.exit_code == 0 and "notes/train" in result.output
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "distill" / "student" / "student")
