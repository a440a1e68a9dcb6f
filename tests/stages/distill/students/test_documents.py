"""The loss of a packed window is that of its documents alone, gradients too; over whole windows it is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, make_teacher
from tiny import MakeProject
from torch import Tensor
from transformers import AutoModelForCausalLM

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.pipeline.models import keeps_documents_apart, spans_from
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets
from ddk_pipe.stages.distill import BatchMaker, DistillStudent
from ddk_pipe.stages.distill.students import needs_rows_apart

VOCAB, SEQ_LEN, KEPT = 64, 24, 4
BY_KIND = {"qwen2": Architecture("qwen2"), **{each.name: each for each in ARCHITECTURES}}
KINDS = ["llama", "qwen2", "gemma3_text", "gpt2", "mamba", "bamba"]


def student(kind: str, folder: Path, **options: Any) -> DistillStudent:
    make_teacher(BY_KIND[kind], folder, vocab_size=VOCAB)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return DistillStudent(lm, apart=not keeps_documents_apart(lm), **options)


def windows() -> list[CachedWindow]:
    """Of several documents each."""
    out = []
    for number, begins in enumerate(([0, 5, 6, 17], [0, 13])):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, VOCAB, (SEQ_LEN,), generator=generator).numpy()
        starts = np.isin(np.arange(SEQ_LEN), begins)
        labels = np.append(np.where(starts[1:], NO_LABEL, tokens[1:]), NO_LABEL)
        ids = torch.rand(SEQ_LEN, VOCAB, generator=generator).argsort(1)[:, :KEPT].sort(1).values.int()
        logprobs = torch.rand(SEQ_LEN, KEPT + 1, generator=generator).log_softmax(1)
        targets = SparseTargets(ids=ids, logprobs=logprobs[:, :KEPT], tail=logprobs[:, KEPT])
        out.append(CachedWindow(tokens, labels, np.zeros(SEQ_LEN, np.float32), targets, starts))
    return out


def part(window: CachedWindow, span: slice) -> CachedWindow:
    """One document as a window of its own."""
    targets = window.targets.rows(span)
    return CachedWindow(window.tokens[span], window.labels[span], window.label_logprobs[span], targets)


def loss_of(one: DistillStudent, given: list[CachedWindow]) -> Tensor:
    batch = BatchMaker.of(one)(given)
    found: Tensor = one(batch.tokens, batch.labels, batch.rows, documents=batch.documents, gamma=0.5).total
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_the_documents_alone(kind: str, tmp_path: Path) -> None:
    one, given = student(kind, tmp_path), windows()
    assert one.apart == (kind in ("mamba", "bamba"))
    parameters = [each for each in one.parameters() if each.requires_grad]
    found = loss_of(one, given)
    gradient = torch.autograd.grad(found, parameters, allow_unused=True)
    spans = [(each, span) for each in given if each.starts is not None for span in spans_from(each.starts)]
    alone = torch.stack(
        [loss_of(one, [part(window, span)]) for window, span in spans if span.stop - span.start > 1]
    )
    wanted = torch.autograd.grad(alone.sum(), parameters, allow_unused=True)
    assert found.item() == pytest.approx(alone.sum().item(), rel=1e-5)
    for got, want in zip(gradient, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert float((got - want).norm()) <= 1e-4 * float(want.norm()) + 1e-6
    whole = [CachedWindow(each.tokens, each.labels, each.label_logprobs, each.targets) for each in given]
    assert abs(loss_of(one, whole).item() / found.item() - 1) > 1e-3, "nothing leaks: this would show nothing"


def test_activation_checkpointing_keeps_documents_apart(tmp_path: Path) -> None:
    one, given = student("llama", tmp_path), windows()
    plain = torch.autograd.grad(loss_of(one, given), list(one.parameters()))
    one.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    one.train()
    again = torch.autograd.grad(loss_of(one, given), list(one.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(plain, again, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns about itself while it compiles
def test_compiled_layers_keep_documents_apart(tmp_path: Path) -> None:
    one, given = student("llama", tmp_path), windows()
    plain = loss_of(one, given).item()
    for block in one.blocks:
        block.compile()
    assert loss_of(one, given).item() == pytest.approx(plain, rel=1e-5)


def test_in_shards_a_student_that_leaks_is_refused(make_project: MakeProject, tmp_path: Path) -> None:
    """Its processes would run it more or less often, and wait for each other for ever."""
    leaks, keeps = (student(kind, tmp_path / kind).lm for kind in ("mamba", "llama"))
    islands = load_project(make_project()).manifest
    with pytest.raises(
        DdkError, match="does not keep documents of a window apart, and a student in shards"
    ) as refused:
        needs_rows_apart(leaks, islands, sharded=True)
    assert "attention: window" in str(refused.value.hint)
    assert needs_rows_apart(leaks, islands, sharded=False)
    assert not needs_rows_apart(keeps, islands, sharded=True)
    windows_seen_whole = islands.model_copy(update={"attention": "window"})
    assert not needs_rows_apart(leaks, windows_seen_whole, sharded=True)
