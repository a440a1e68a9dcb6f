"""The transformers teacher: aligned to the token, blocks and batches without influence, honest about odd heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignment import STEP, assert_aligned, prefix_logprobs
from tiny import make_model
from transformers import AutoModelForCausalLM

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import head_is_plain
from ddk_pipe.pipeline.selection import Plan, Selected
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.stages.teachers import Window, choose_backend, open_teacher
from ddk_pipe.stages.teachers.hf import HfTeacher

PLAN = Plan("threshold", 0.02, 8, 64, 20, (1.0,), 0)


def make_window(seed: int, length: int = 24, vocab: int = 300) -> Window:
    tokens = np.random.default_rng(seed).integers(0, vocab, length)
    labels = np.append(tokens[1:], NO_LABEL)
    labels[3] = NO_LABEL
    return Window(f"d/train/0/{seed}", tokens, labels)


def teacher(folder: Path, **options: Any) -> HfTeacher:
    return HfTeacher(folder, manifest.Teacher(model="m", backend="hf", **options))


@pytest.fixture(scope="module")
def truth(tiny_teacher: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    return prefix_logprobs(model, make_window(0).tokens.tolist())


def test_first_token_and_boundary_alignment(tiny_teacher: Path, truth: torch.Tensor) -> None:
    window = make_window(0)
    (selected,) = teacher(tiny_teacher).select([window], PLAN)
    assert_aligned(selected, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=STEP)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_selection_fails_that_test(tiny_teacher: Path, truth: torch.Tensor, shift: int) -> None:
    window = make_window(0)
    (selected,) = teacher(tiny_teacher).select([window], PLAN)
    rows = torch.arange(len(window.labels)).roll(shift)
    targets = selected.targets[0].rows(rows)
    shifted = Selected(selected.label_logprobs[rows], (targets,))
    with pytest.raises(AssertionError):
        assert_aligned(shifted, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=STEP)
    only_targets = Selected(selected.label_logprobs, (targets,))
    with pytest.raises(AssertionError):
        assert_aligned(only_targets, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=STEP)


@pytest.mark.parametrize("scheme", ["pps", "threshold", "topk", "random"])
def test_batches_and_blocks_do_not_change_a_window(
    tiny_teacher: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(scheme, 0.02, 8, 64, 20, (1.0, 2.0), 0)
    windows = [make_window(seed) for seed in range(5)]
    one = teacher(tiny_teacher, batch_windows=1).select(windows, plan)
    monkeypatch.setattr("ddk_pipe.stages.teachers.hf.head_rows", lambda _: 7)
    other = teacher(tiny_teacher, batch_windows=4).select(windows, plan)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a.label_logprobs, b.label_logprobs, atol=1e-4, equal_nan=True)
        for first, second in zip(a.targets, b.targets, strict=True):
            same = (first.ids == second.ids).all(1) if first.ids.shape == second.ids.shape else torch.zeros(1)
            assert (
                float(same.double().mean()) > 0.9
            )  # a batch may move a probability by an ulp, and a draw with it


def test_heads_that_soft_cap_are_noticed_and_predicted_rightly(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        max_position_embeddings=64,
    )
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    model.save_pretrained(tmp_path)
    assert not head_is_plain(model)
    window = make_window(1, vocab=64)
    (selected,) = teacher(tmp_path).select([window], PLAN)
    truth = prefix_logprobs(model.float(), window.tokens.tolist())
    assert_aligned(selected, truth, window.labels.tolist(), tau=PLAN.tau, tolerance=1e-3)


def test_broken_weights_name_the_window(tmp_path: Path) -> None:
    folder = make_model(tmp_path, vocab_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(DdkError, match="window d/train/0/2: the teacher's logits hold NaN"):
        teacher(folder).select([make_window(2, vocab=64)], PLAN)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path) -> None:
    import importlib.util

    options = manifest.Teacher(model="m")
    real = importlib.util.find_spec
    for installed, expected in ((True, "vllm"), (False, "hf")):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, there=installed: there or None if name == "vllm" else real(name, *rest),
        )
        assert choose_backend(options) == expected
    assert choose_backend(manifest.Teacher(model="m", backend="hf")) == "hf"
    opened = open_teacher(tiny_teacher, manifest.Teacher(model="m"), backend="hf", seq_len=8)
    assert opened.describe()["engine"] == "transformers" and opened.vocab_size == 385
    opened.close()
