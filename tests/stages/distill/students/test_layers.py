"""A model cut to some of its layers: in their order, numbered anew, each on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.distill.students.layers import keep_layers


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def test_a_layer_named_twice_is_there_twice_on_its_own() -> None:
    lm = llama()
    second = lm.model.layers[1].mlp.up_proj.weight.clone()
    keep_layers(lm, [1, 1, 3])
    one, other = (layer.mlp.up_proj.weight for layer in lm.model.layers[:2])
    assert torch.equal(one, second) and torch.equal(other, second)
    with torch.no_grad():
        one.zero_()
    assert torch.equal(other, second)
    assert [layer.self_attn.layer_idx for layer in lm.model.layers] == [0, 1, 2]
    assert lm.config.num_hidden_layers == 3


def test_parts_of_layers_in_several_lists_are_cut_together() -> None:
    from transformers import XLMConfig, XLMWithLMHeadModel

    lm = XLMWithLMHeadModel(XLMConfig(vocab_size=32, emb_dim=16, n_layers=4, n_heads=2, causal=True)).eval()
    ffn = lm.transformer.ffns[3]
    keep_layers(lm, [0, 3])
    assert len(lm.transformer.attentions) == 2 and lm.transformer.ffns[1] is ffn
    assert lm(input_ids=torch.arange(4)[None]).logits.shape == (1, 4, 32)


def test_a_layer_beyond_the_depth_is_refused() -> None:
    with pytest.raises(DdkError, match=r"keep_layers: layer 4 of a teacher with 4 layers; use 0 to 3"):
        keep_layers(llama(), [0, 4])
