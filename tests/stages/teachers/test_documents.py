"""Targets of a document inside a packed window are those of the document alone; over whole windows they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, make_teacher

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.models import spans_from
from ddk_pipe.pipeline.targets import NO_LABEL, Plan, Selected
from ddk_pipe.stages.teachers import Window
from ddk_pipe.stages.teachers.hf import HfTeacher

VOCAB, SEQ_LEN = 64, 24
PLAN = Plan("topk", 0.02, 8, 64, 20, (1.0, 2.0), 0)
BY_KIND = {"qwen2": Architecture("qwen2"), **{each.name: each for each in ARCHITECTURES}}
KINDS = [
    "llama",
    "qwen2",
    "gemma3_text",
    "gpt2",
    "mamba",
    "bamba",
    "gemma2",
]  # the last: logits by its own forward


def teacher(folder: Path, **options: Any) -> HfTeacher:
    return HfTeacher(folder, manifest.Teacher(model="m", backend="hf", dtype="float32", **options))


def windows() -> list[Window]:
    """Of several documents each, one of them of whole length."""
    out = []
    for number, begins in enumerate(([0, 5, 6, 17], [0], [0, 13])):
        tokens = np.random.default_rng(number).integers(0, VOCAB, SEQ_LEN)
        starts = np.isin(np.arange(SEQ_LEN), begins)
        labels = np.append(np.where(starts[1:], NO_LABEL, tokens[1:]), NO_LABEL)
        out.append(Window(f"d/train/0/{number}", tokens, labels, starts))
    return out


def furthest(opened: HfTeacher, given: list[Window], found: list[Selected]) -> float:
    """How far labels' log-probabilities and targets' are from those of each document alone, nats."""
    apart = 0.0
    for window, selected in zip(given, found, strict=True):
        assert window.starts is not None
        for span in spans_from(window.starts):
            (alone,) = opened.select([Window("alone", window.tokens[span], window.labels[span])], PLAN)
            inside = selected.rows(span)
            pairs = [(inside.label_logprobs, alone.label_logprobs)]
            for one, other in zip(inside.targets, alone.targets, strict=True):
                width = other.ids.shape[1]
                assert torch.equal(one.ids[:, :width], other.ids) or apart > 1e-5
                pairs += [(one.logprobs[:, :width], other.logprobs), (one.tail, other.tail)]
            for here, there in pairs:
                gap = (here - there)[there.isfinite()].abs()
                apart = max(apart, float(gap.max()) if gap.numel() else 0.0)
    return apart


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_those_of_the_document_alone(kind: str, tmp_path: Path) -> None:
    opened, given = teacher(make_teacher(BY_KIND[kind], tmp_path, vocab_size=VOCAB)), windows()
    assert furthest(opened, given, opened.select(given, PLAN)) <= 1e-5
    whole = [Window(window.key, window.tokens, window.labels) for window in given]
    leaking = opened.select(whole, PLAN)
    leak = max(
        float((one.label_logprobs - other.label_logprobs).nan_to_num().abs().max())
        for one, other in zip(leaking, opened.select(given, PLAN), strict=True)
    )
    assert leak > 0.05, "nothing leaks: this test would show nothing"


def test_a_model_that_leaks_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = teacher(make_teacher(BY_KIND["mamba"], tmp_path, vocab_size=VOCAB), batch_windows=1)
    opened.select(windows(), PLAN)
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert (
        said.count("MambaForCausalLM does not keep documents of a row apart; each has a row of its own") == 1
    )
