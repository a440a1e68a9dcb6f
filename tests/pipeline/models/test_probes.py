"""What a model does, tried: a plain output layer, no sight of what is to come; the trial leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import check_causal, decoder_of, head_is_plain

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 60}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = LlamaConfig(**SMALL, **HEADS, **ENDS)


def built(config: PreTrainedConfig) -> Any:
    """With larger weights than at the start of training: rounding to 16 bits must not hide what moves."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.ndim >= 2):
            matrix.normal_(0, 0.25)
    return model


def bert(*, is_decoder: bool) -> Any:
    return built(BertConfig(**SMALL, num_attention_heads=4, is_decoder=is_decoder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_what_is_to_come_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DdkError, match="BertLMHeadModel sees the tokens to come"):
        check_causal(bert(is_decoder=False).to(dtype), field="student.model")
    check_causal(bert(is_decoder=True).to(dtype), field="student.model")
    check_causal(built(LLAMA).to(dtype), field="student.model")


def test_dropout_does_not_disturb_a_trial_and_stays_on() -> None:
    """Drawn anew at each call it made every output layer look like another."""
    model = built(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=60, bos_token_id=0, eos_token_id=0
        )
    )
    model.train()
    before = torch.get_rng_state()
    assert head_is_plain(model)
    check_causal(model, field="student.config")
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_a_decoder_that_its_class_names_otherwise() -> None:
    """Llama 4's base_model is the model itself, whose answer has no last hidden state."""
    model = built(
        Llama4TextConfig(**SMALL, **HEADS, **ENDS, intermediate_size_mlp=64, num_local_experts=2, head_dim=8)
    )
    assert model.base_model is model and decoder_of(model) is model.model
    assert head_is_plain(model)
    llama = built(LLAMA)
    assert decoder_of(llama) is llama.model
