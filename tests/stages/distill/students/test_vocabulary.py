"""A fresh student's vocabulary: padded to whole columns of a GPU, which nobody names and nothing generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits
from sweeps import SMALL
from tiny import MakeProject
from transformers import AutoModelForCausalLM

from ddk_pipe.pipeline.cache import read_spec
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.stages.common import read_student_record
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.students import build_student
from ddk_pipe.stages.distill.students.vocabulary import padded

IDS, ROWS = 385, 448
STEP = Run._step


def project_of(cached: Path, **config: object) -> Project:
    values = json.loads(cached.read_text())
    cached.write_text(json.dumps({**values, "student": {"config": {**SMALL, **config}}}))
    return load_project(cached, ["distill.checkpoint_steps=1"])


def rows_of(project: Project) -> int:
    lm = build_student(project, vocab_size=IDS, seed=0)
    assert lm.config.vocab_size == lm.get_output_embeddings().weight.shape[0]
    return int(lm.config.vocab_size)


def killed(self: Run, position: Any, data: Any) -> Any:
    """A step of a run that is stopped by its user after the third."""
    if position.step == 3:
        raise KeyboardInterrupt
    return STEP(self, position, data)


def test_multiples_stay() -> None:
    assert [padded(ids) for ids in (1, 63, 64, 65, 128)] == [64, 64, 64, 128, 128]


@pytest.mark.parametrize("tied", [False, True])
def test_only_a_vocabulary_that_is_left_open_is_padded(make_project: MakeProject, tied: bool) -> None:
    path = make_project()
    assert rows_of(project_of(path, tie_word_embeddings=tied)) == ROWS
    assert rows_of(project_of(path, vocab_size=401)) == 401


def test_padding_is_recorded_and_never_generated(cached: Path) -> None:
    project = project_of(cached)
    assert read_spec(project.cache).vocab_size == IDS
    distill(project)
    folder = project.run / "student"
    record = read_student_record(folder)
    assert record is not None and record["ids"] == IDS
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # as badly as it could be
        model.lm_head.weight[IDS:] = 100 * model.lm_head.weight[:1].sign()
        model.lm_head.weight[:IDS] = 0.0
    for sampled in (False, True):
        tokens = model.generate(
            torch.ones(4, 3, dtype=torch.int64), max_new_tokens=8, do_sample=sampled, eos_token_id=None
        )
        assert int(tokens.max()) < IDS
    model.generation_config.suppress_tokens = None
    assert int(model.generate(torch.ones(4, 3, dtype=torch.int64), max_new_tokens=8).max()) >= IDS


def test_padding_loses_mass_as_any_id_that_is_never_seen(cached: Path) -> None:
    project = project_of(cached)
    before = build_student(project, vocab_size=IDS, seed=0)
    distill(load_project(cached, ["distill.steps=40"]))
    after = AutoModelForCausalLM.from_pretrained(project.run / "student")
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        one, other = (model(tokens).logits.softmax(-1)[..., IDS:].sum(-1).mean() for model in (before, after))
    assert float(other) < float(one)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_from_before_goes_on_without_padding(
    cached: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """To the same bits as if there had never been any."""
    project = project_of(cached, tie_word_embeddings=tied)
    named = {
        name: load_project(cached, [f"distill.name={name}", "distill.checkpoint_steps=1"])
        for name in ("whole", "stopped")
    }
    with monkeypatch.context() as patch:
        patch.setattr("ddk_pipe.stages.distill.students.vocabulary.MULTIPLE", 1)
        distill(named["whole"])
        patch.setattr(Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(named["stopped"])
    distill(named["stopped"])
    assert_same_bits(named["whole"].run, named["stopped"].run)
    assert rows_of(project) == ROWS
