"""Evaluation: its figures against plain ones, lm-eval offline, and how they join the record and the report."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ddk_pipe.pipeline.cache import CacheReader, read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.pipeline.models import spans_from
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.pipeline.text import VALIDATION
from ddk_pipe.stages.cli import app
from ddk_pipe.stages.common import read_student_record
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.evaluate import Request, evaluate
from ddk_pipe.stages.evaluate.origin import say_if_another
from ddk_pipe.stages.evaluate.stage import label_bytes
from ddk_pipe.stages.report import report


@pytest.fixture
def project(cached: Path) -> Project:
    """With a finished run."""
    found = load_project(cached, ["distill.steps=2", "distill.validation_windows=2"])
    distill(found)
    return found


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_figures_are_the_plain_ones(project: Project) -> None:
    """Against whole logits in float64, document by document."""
    found = evaluate(project.run)["builtin"]["domains"]
    model = AutoModelForCausalLM.from_pretrained(project.run / "student").double()
    reader = CacheReader(project.cache, 1.0)
    for domain in ("code", "plays"):
        nats, teacher, same, compared = [], [], 0, 0
        for number in range(reader.size(domain, VALIDATION).windows):
            window = reader.read(domain, VALIDATION, number)
            live = window.labels != NO_LABEL
            assert window.starts is not None
            each = [torch.from_numpy(window.tokens[span])[None] for span in spans_from(window.starts)]
            with torch.no_grad():
                logits = torch.cat([model(document).logits[0] for document in each]).log_softmax(-1)
            places, wanted = np.flatnonzero(live), window.labels[live]
            nats += (-logits[places, wanted]).tolist()
            teacher += (-window.label_logprobs[live].astype(np.float64)).tolist()
            targets = window.targets.rows(torch.from_numpy(live))
            best = targets.ids.gather(1, targets.logprobs.argmax(1, keepdim=True))[:, 0]
            same += int((logits[places].argmax(-1) == best).sum())
            compared += len(places)
        facts = found[domain]
        assert facts["student_ce"] == pytest.approx(np.mean(nats), rel=1e-5)
        assert facts["teacher_ce"] == pytest.approx(np.mean(teacher), rel=1e-9)
        assert facts["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        assert facts["teacher_agreement"] == pytest.approx(same / compared, abs=1.5 / compared)
        assert facts["bits_per_byte"] == pytest.approx(np.sum(nats) / math.log(2) / facts["bytes"], rel=1e-5)
        assert 0 <= facts["calibration_error"] <= 1 and facts["positions"] == compared


def test_bytes_of_labels(tiny_teacher: Path) -> None:
    """Every byte of the text but the first token's, which nothing announces; also where a window cuts a letter."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    text = "Über Wetter und Berge: naïve 漢字!"
    ids = tokenizer(text).input_ids
    labels = np.array([*ids, tokenizer.eos_token_id, NO_LABEL])
    assert label_bytes(tokenizer, labels) == len(text.encode())
    labels[3:5] = NO_LABEL
    left = tokenizer.decode(ids[:3]) + tokenizer.decode(ids[5:])
    assert label_bytes(tokenizer, labels) == len(left.encode())


def test_joins_the_record_and_the_report(project: Project) -> None:
    status, shown, said = call("evaluate", project.run, "--windows", 1, "--json")
    assert status == 0 and "bits/byte" in shown and "report" in said
    kept = json.loads((project.run / "evaluation.json").read_text())
    assert kept["builtin"]["domains"]["code"]["windows"] == 1
    figure = f"{kept['builtin']['domains']['code']['bits_per_byte']:.4f}"
    assert figure in report(project.run)[0].read_text()


def test_any_model_folder(project: Project, tiny_teacher: Path) -> None:
    """The teacher agrees with itself nearly everywhere, and its CE is the cached one."""
    found = evaluate(tiny_teacher, Request(cache=project.cache.name))["builtin"]["domains"]["code"]
    assert found["student_ce"] == pytest.approx(found["teacher_ce"], rel=1e-2)
    assert found["teacher_agreement"] > 0.95
    assert not (tiny_teacher / "evaluation.json").exists()


def test_refused(project: Project, tmp_path: Path, tiny_teacher: Path) -> None:
    assert "name one with --cache" in call("evaluate", tiny_teacher)[2]
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    make_tokenizer(other, vocab_size=350)
    assert "is not the one the cache" in call("evaluate", other, "--cache", project.cache.name)[2]
    shutil.rmtree(project.run / "student")
    assert "not finished" in call("evaluate", project.run)[2]
    with pytest.raises(DdkError, match="no folder"):
        evaluate(tmp_path / "nothing", Request(cache="x"))


# --- lm-eval --------------------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: {kind}
"""
QUESTIONS = (
    "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n"
)
ROLLING = (
    'doc_to_text: ""\ndoc_to_target: text\n'
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
)


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task and one of rolling perplexity, their data beside them."""
    folder = tmp_path / "tasks"
    questions = [
        {"question": "To be, or not to be, that is the", "choices": [" question.", " return"], "label": i % 2}
        for i in range(6)
    ]
    texts: list[dict[str, Any]] = [{"text": "The quick brown fox jumps over the lazy dog."}]
    for name, kind, rows, rest in (
        ("my_questions", "multiple_choice", questions, QUESTIONS),
        ("my_text", "loglikelihood_rolling", texts, ROLLING),
    ):
        data = write_jsonl(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind) + rest)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-eval's own dependencies
def test_lm_eval_offline(project: Project, task_folder: Path) -> None:
    """Its numbers are those of the logits, and the report shows them."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: `make setup`")
    request = Request(windows=1, tasks=("my_questions", "my_text"), task_folder=task_folder)
    tasks = evaluate(project.run, request)["tasks"]
    assert (
        tasks["my_questions"]["acc"] == 0.5
    )  # the same question, its answer once the one and once the other
    tokenizer = AutoTokenizer.from_pretrained(project.run / "student")
    model = AutoModelForCausalLM.from_pretrained(project.run / "student")
    text = "The quick brown fox jumps over the lazy dog."
    ids = tokenizer(text, return_tensors="pt").input_ids
    whole = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
    with torch.no_grad():
        logprobs = model(whole).logits[0, :-1].log_softmax(-1)
    bits = -float(logprobs.gather(1, ids[0][:, None]).sum()) / math.log(2) / len(text.encode())
    assert tasks["my_text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    page = report(project.run)[0].read_text()
    assert "my_questions" in page and f"{tasks['my_text']['bits_per_byte']:.4f}" in page
    with pytest.raises(DdkError, match="lm-eval has no such task"):
        evaluate(project.run, Request(windows=1, tasks=("nothing_like_it",), task_folder=task_folder))
    assert "my_questions" in evaluate(project.run, Request(windows=1))["tasks"]  # earlier ones stay


# --- what the student was made of -------------------------------------------------------------------


def test_by_the_cache_of_another_teacher_is_said(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = read_spec(project.cache)
    quiet = evaluate(project.run)["builtin"]
    assert "was trained" not in capsys.readouterr().err
    for changed, told in (
        (
            {"teacher": {**spec.teacher, "weights_digest": "0" * 32}},
            "on another teacher than that of the cache at",
        ),
        ({"plan": replace(spec.plan, seed=7)}, "from other targets than those of the cache at"),
    ):
        record = read_student_record(project.run / "student")
        say_if_another(project.run, record, replace(spec, **changed), "there")
        said = capsys.readouterr().err
        assert told in said and (("there 00000000" in said) == ("teacher" in changed))
    assert evaluate(project.run)["builtin"] == quiet


def test_weights_that_were_replaced_are_refused(project: Project, tmp_path: Path) -> None:
    student = project.run / "student"
    shutil.copytree(student, tmp_path / "copy")
    for folder in (student, tmp_path / "copy"):  # a run's, and a folder that was given away
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        model.save_pretrained(folder)
    for place, told in ((project.run, student), (tmp_path / "copy", tmp_path / "copy")):
        status, _, said = call("evaluate", place, "--cache", project.cache.name)
        assert status == 2 and f"{told}/model.safetensors: not what the run saved (blake2b" in said
    (tmp_path / "copy" / "ddk_pipe.json").unlink()  # a model of one's own
    assert call("evaluate", tmp_path / "copy", "--cache", project.cache.name)[0] == 0


def test_a_head_of_fewer_tokens_than_the_cache_holds(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.run / "student", tmp_path / "small")
    (tmp_path / "small" / "ddk_pipe.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    status, _, said = call("evaluate", tmp_path / "small", "--cache", project.cache.name)
    assert (
        status == 2 and "STUDENT: a vocabulary of 100, the cache at" in said and len(said.splitlines()) == 1
    )
