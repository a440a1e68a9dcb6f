"""vLLM's own classes under our hook, as far as a CPU goes: its V2 runner needs a GPU or Triton."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.targets import Plan, select_logits
from ddk_pipe.stages.teachers import open_teacher
from ddk_pipe.stages.teachers.hf import HfTeacher
from ddk_pipe.stages.teachers.vllm import engine
from ddk_pipe.stages.teachers.vllm import worker as vllm_worker
from ddk_pipe.stages.teachers.vllm.worker import SelectionExtension, unpack

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports use what torch deprecates
]
VOCAB, LENGTH, OTHER = 70, 20, 4
PLAN = Plan("pps", 0.05, 8, 64, 20, (1.0, 2.0), 0)
LABELS = np.append(np.arange(1, LENGTH), -100)
PROMPT = LENGTH - 1  # a window without its last token


def v2_batch(start: int, rows: int) -> Any:
    """vLLM's InputBatch with a request of four tokens that asks for nothing before ours; the rest of it unset."""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    known: dict[str, Any] = {
        "req_ids": ["other-01234567", "7-0123abcd"],
        "num_reqs": 2,
        "num_tokens": OTHER + rows,
        "idx_mapping_np": np.array([3, 1]),
        "num_scheduled_tokens": np.array([OTHER, rows]),
        "query_start_loc_np": np.array([0, OTHER, OTHER + rows]),
        "prefill_len_np": np.array([OTHER, PROMPT]),
        "num_computed_prefill_tokens_np": np.array([0, start]),
    }
    unset = {each.name: None for each in dataclasses.fields(InputBatch) if each.name not in known}
    return InputBatch(**known, **unset)


def test_the_v2_hook_on_vllms_own_classes(need_vllm: None) -> None:
    """Installed on a real PromptLogprobsWorker, called with real batches; the runner around them is a fake."""
    engine.keep_our_name_from_vllm()
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    generator = torch.Generator().manual_seed(0)
    head = torch.randn(8, VOCAB, generator=generator) * 2
    hidden = torch.randn(LENGTH, 8, generator=generator)
    worker = PromptLogprobsWorker(4, torch.device("cpu"))
    extension = SelectionExtension()
    extension.model_runner = SimpleNamespace(prompt_logprobs_worker=worker)
    assert extension.ddk_install(PLAN.to_dict(), VOCAB) == "v2", "the method is what our replacement expects"
    worker.add_request("other-01234567", 3, SamplingParams())
    worker.add_request("7-0123abcd", 1, SamplingParams(max_tokens=1, prompt_logprobs=0))
    extension.ddk_expect([("7", "k", LABELS.tobytes())])
    prompt_lens = np.array([0, PROMPT, 0, OTHER])
    for start, rows in ((0, 12), (12, 7)):  # chunked prefill
        states = torch.cat([torch.full((OTHER, 8), 99.0), hidden[start : start + rows]])
        batch = v2_batch(start, rows)
        found = worker.compute_prompt_logprobs(
            lambda some: some @ head, states, batch, torch.empty(0), torch.empty(0), prompt_lens
        )
        assert found == {}, "vLLM has no objects to make"
    done = unpack(extension.ddk_take()["done"]["7"])
    uniforms = torch.from_numpy(PLAN.uniforms("k", LENGTH))
    truth = select_logits(hidden @ head, torch.from_numpy(LABELS), PLAN, uniforms)
    assert torch.allclose(done.label_logprobs, truth.label_logprobs, atol=1e-5, equal_nan=True)
    assert all(a.ids.equal(b.ids) for a, b in zip(done.targets, truth.targets, strict=True))
    assert all(a.head.equal(b.head) for a, b in zip(done.kept, truth.kept, strict=True))
    assert all(torch.allclose(a.mass, b.mass, atol=1e-6) for a, b in zip(done.kept, truth.kept, strict=True))
    worker.remove_request("7-0123abcd")
    extension.ddk_uninstall()
    assert "compute_prompt_logprobs" not in worker.__dict__


def test_the_hook_fits_this_vllm(need_vllm: None) -> None:
    engine.check_engine()


def test_a_vllm_that_the_hook_does_not_fit(
    need_vllm: None, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a weight is loaded where vLLM was asked for; where nothing was, transformers does it."""
    monkeypatch.setattr(vllm_worker, "V1_ARGUMENTS", ["something", "else"])
    monkeypatch.setattr(vllm_worker, "V2_ARGUMENTS", ["something", "else"])
    asked = manifest.Teacher(model="m", backend="vllm")
    with pytest.raises(DdkError, match=r"vLLM 0\.32\S*: the worker hook does not fit .*use backend: hf"):
        open_teacher(tiny_teacher, asked, backend="vllm", seq_len=8)
    teacher = open_teacher(tiny_teacher, manifest.Teacher(model="m"), backend="vllm", seq_len=8)
    assert isinstance(teacher, HfTeacher)
    assert "does not fit" in capsys.readouterr().err


def test_a_vllm_that_is_too_old(need_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.19.1")
    with pytest.raises(DdkError, match=r"vLLM 0\.19\.1 is too old, at least 0\.24 is needed"):
        engine.check_engine()
