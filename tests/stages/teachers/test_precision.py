"""A teacher in 16 bits: its hidden states are rounded, its logits are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.targets import NO_LABEL, Plan
from ddk_pipe.stages.teachers import Window, widens
from ddk_pipe.stages.teachers.hf import Head, HfTeacher
from ddk_pipe.stages.teachers.precision import product, widen

PLAN = Plan("topk", 0.02, 4, 64, 20, (1.0,), 0)
VOCAB = 96


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose logits go up to some 25."""
    folder = make_model(tmp_path_factory.mktemp("large"), vocab_size=VOCAB)
    return folder


def opened(folder: Path, **options: Any) -> HfTeacher:
    return HfTeacher(folder, manifest.Teacher(model="m", backend="hf", **options))


def error(teacher: HfTeacher, seed: int) -> float:
    """Largest error of label log-probabilities, nats, against a float64 head on the same hidden states."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, 32)
    window = Window("d/train/0/0", tokens, np.append(tokens[1:], NO_LABEL))
    (selected,) = teacher.select([window], PLAN)
    with torch.inference_mode():
        states = teacher.head.states(torch.from_numpy(tokens)[None])[0]
        logits = states.double() @ teacher.head.layer.weight.double().t()
        assert 15 < float(logits.abs().max()) < 64
    truth = torch.log_softmax(logits, 1)[:-1].gather(1, torch.from_numpy(tokens[1:, None]))[:, 0]
    return float((selected.label_logprobs[:-1] - truth).abs().max())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_log_probabilities_lose_nothing_to_the_output_layer(large: Path, seed: int) -> None:
    """float16 has three bits more than bfloat16."""
    for dtype, rounds in (("bfloat16", 0.01), ("float16", 0.001)):
        assert error(teacher(large, dtype, "float32"), seed) < 2e-5
        assert rounds < error(teacher(large, dtype, "model"), seed) < 0.2


TEACHERS: dict[tuple[str, str], HfTeacher] = {}


def teacher(folder: Path, dtype: str, logits: str) -> HfTeacher:
    """Opened once."""
    if (dtype, logits) not in TEACHERS:
        TEACHERS[dtype, logits] = opened(folder, dtype=dtype, logits=logits)
    return TEACHERS[dtype, logits]


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_of_the_same_operands(shape: tuple[int, ...], biased: bool) -> None:
    layer = torch.nn.Linear(16, 40, bias=biased).bfloat16()
    states = (torch.randn(*shape, 16) * 8).bfloat16()
    found = product(states, layer.weight, layer.bias)
    exact = layer.double()(states.double())
    assert found.dtype == torch.float32 and found.shape == (*shape, 40)
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_blocks", [True, False])
def test_what_follows_the_output_layer_is_not_rounded_either(
    monkeypatch: pytest.MonkeyPatch, in_blocks: bool
) -> None:
    """A soft cap, within the model's own forward."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, final_logit_softcapping=30.0, **sizes, **heads))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
    model = model.bfloat16().eval()
    if not in_blocks:
        monkeypatch.setattr(Head, "_stand_in_is_right", lambda self: False)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        head = Head(model, None, wide=True)
        assert head.in_blocks == in_blocks
        logits = head.logits(head.states(tokens)[0])
        hidden = model.model(input_ids=tokens).last_hidden_state[0].double()
        exact = 30 * torch.tanh(hidden @ model.lm_head.weight.double().t() / 30)
    assert float(exact.abs().max()) > 10
    assert logits.dtype == torch.float32 and torch.allclose(logits.double(), exact, atol=1e-4)


def test_layers_that_round_by_themselves_are_refused() -> None:
    class Packed(torch.nn.Module):
        weight = torch.zeros(3, 2, dtype=torch.int8)

    for layer in (Packed(), torch.nn.Linear(2, 3)):
        with pytest.raises(DdkError, match=r"not to be had .*; set teacher.logits: model"):
            widen(layer)


def test_a_model_that_rounds_after_its_output_layer_is_refused(large: Path) -> None:
    model = opened(large, dtype="bfloat16").head
    model.layer.forward = lambda states: states.bfloat16() @ model.layer.weight.t()
    with pytest.raises(DdkError, match=r"rounds them once more; set teacher.logits: model"):
        model.logits(torch.zeros(2, 32, dtype=torch.bfloat16))


def test_only_16_bits_are_widened() -> None:
    options = manifest.Teacher(model="m")
    assert widens(options, torch.bfloat16) and widens(options, torch.float16)
    assert not widens(options, torch.float32)
    assert not widens(manifest.Teacher(model="m", logits="model"), torch.bfloat16)
