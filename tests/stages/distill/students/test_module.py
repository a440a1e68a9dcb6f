"""Students whose output layer is more than a product: soft caps reach the loss, anything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakeProject
from torch import Tensor

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import SparseKdLoss, sparse_kd_reference
from ddk_pipe.pipeline.manifest import Project, Student, load_project
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets
from ddk_pipe.stages.distill import DistillStudent, distill, logit_softcap
from ddk_pipe.stages.distill.students import build_student

VOCAB, WINDOWS, SEQ_LEN, KEPT = 64, 2, 9, 4
GEMMA = {
    "model_type": "gemma2",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "final_logit_softcapping": 2.0,
}


def gemma(*, louder: float = 50.0, **changes: Any) -> Any:
    """A Gemma 2 of random weights; its embeddings, the tied output layer too, are `louder` so that the cap
    bends."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    values = {key: value for key, value in GEMMA.items() if key != "model_type"}
    torch.manual_seed(0)
    lm = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, **{**values, **changes})).eval()
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(louder)
    return lm


def batch() -> tuple[Tensor, Tensor, SparseTargets]:
    """tokens, labels [WINDOWS, SEQ_LEN], one of them missing, and a bucket of KEPT ids at every position."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (WINDOWS, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3] = NO_LABEL
    positions = WINDOWS * SEQ_LEN
    order = torch.rand(positions, VOCAB, generator=generator).argsort(1)[:, :KEPT].sort(1).values
    logprobs = torch.rand(positions, KEPT + 1, generator=generator).log_softmax(1)
    targets = SparseTargets(ids=order.int(), logprobs=logprobs[:, :KEPT], tail=logprobs[:, KEPT])
    return tokens[:, :-1], labels, targets


def gradients(lm: Any, loss: SparseKdLoss) -> list[Tensor]:
    return list(torch.autograd.grad(loss.total, list(lm.parameters())))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_of_a_soft_capped_student_is_the_reference_on_its_own_logits(temperature: float) -> None:
    lm = gemma()
    tokens, labels, targets = batch()
    options: dict[str, Any] = {"gamma": 0.7, "temperature": temperature}
    found = DistillStudent(lm)(tokens, labels, targets, **options)
    logits = lm(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    truth = sparse_kd_reference(logits, labels.flatten(), targets, **options)
    assert float(logits.detach().abs().max()) > 1.9, "the cap does not bend: this test would show nothing"
    assert found.positions == truth.positions == WINDOWS * SEQ_LEN - 1
    for name in ("total", "ce", "kl"):
        assert getattr(found, name).item() == pytest.approx(getattr(truth, name).item(), rel=2e-6)
    for got, want in zip(gradients(lm, found), gradients(lm, truth), strict=True):
        # the rest of the model is float32 in both
        assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-7


def test_without_the_cap_it_would_be_another_loss() -> None:
    student = DistillStudent(gemma())
    tokens, labels, targets = batch()
    capped = student(tokens, labels, targets, gamma=1.0).total.item()
    student.softcap = None
    assert abs(capped / student(tokens, labels, targets, gamma=1.0).total.item() - 1) > 0.1


@pytest.mark.parametrize("cap", [2.0, 30.0, None])
def test_the_cap_is_that_of_the_configuration(cap: float | None) -> None:
    assert logit_softcap(gemma(final_logit_softcapping=cap)) == cap


def test_other_models_have_no_cap(tiny_teacher: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert DistillStudent(AutoModelForCausalLM.from_pretrained(tiny_teacher)).softcap is None


def test_a_soft_capped_student_is_trained_and_keeps_its_cap(cached: Path) -> None:
    project = load_project(cached)
    manifest = project.manifest
    student = Student(config=dict(GEMMA))
    project = Project(manifest.model_copy(update={"student": student}), project.root)
    summary = distill(project)
    assert summary["steps"] == manifest.distill.steps

    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(project.run / "student").final_logit_softcapping == 2.0


def test_a_student_that_scales_its_logits_is_refused(make_project: MakeProject) -> None:
    scaled = {**GEMMA, "model_type": "cohere", "logit_scale": 0.0625, "pad_token_id": 0}
    project = load_project(make_project(student={"config": scaled}))
    with pytest.raises(DdkError, match="scales its logits"):
        build_student(project, vocab_size=VOCAB, seed=0)


def test_a_capped_student_that_scales_as_well_is_refused(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma2ForCausalLM

    forward = Gemma2ForCausalLM.forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        out = forward(*arguments, **options)
        out.logits = out.logits * 1.1
        return out

    project = load_project(make_project(student={"config": dict(GEMMA)}))
    assert build_student(project, vocab_size=VOCAB, seed=0).config.final_logit_softcapping == 2.0
    monkeypatch.setattr(Gemma2ForCausalLM, "forward", scaled)
    with pytest.raises(DdkError, match="scales its logits"):
        build_student(project, vocab_size=VOCAB, seed=0)
