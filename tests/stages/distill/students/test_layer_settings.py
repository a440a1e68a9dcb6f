"""What a configuration says of the kept layers is what it said of them before, or the choice is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.distill.students.layer_settings import RULES, Rule, cut_settings

DEPTH = 8


def config_of(kind: str, **values: Any) -> Any:
    return AutoConfig.for_model(kind, **{"num_hidden_layers": DEPTH, **values})


def cut(config: Any, *keep: int) -> Any:
    cut_settings(config, list(keep), DEPTH)
    assert config.num_hidden_layers == len(keep)
    return config


def test_lists_by_layer_are_cut() -> None:
    windows = config_of("gemma2")
    before = windows.layer_types
    assert cut(windows, 7, 1, 1, 2).layer_types == [before[7], before[1], before[1], before[2]]
    assert cut(config_of("smollm3", no_rope_layer_interval=4), 2, 3, 7).no_rope_layers == [1, 0, 0]
    local = cut(config_of("gpt_neo", attention_types=[[["global", "local"], 4]]), 1, 2, 5)
    assert local.expand_attention_types_params(local.attention_types) == ["local", "global", "local"]
    assert cut(config_of("hunyuan_v1_moe", moe_topk=list(range(1, 9))), 0, 7).moe_topk == [1, 8]


def test_lists_of_layer_numbers_are_mapped() -> None:
    assert cut(config_of("bamba", attn_layer_indices=[2, 5]), 0, 2, 3, 5).attn_layer_indices == [1, 3]
    experts = config_of(
        "llama4_text", interleave_moe_layer_step=1
    )  # every layer: as long as the model is deep
    assert experts.moe_layers == list(range(DEPTH))
    assert cut(experts, 1, 6).moe_layers == [0, 1]


def test_what_is_as_long_by_chance_stays() -> None:
    ends = list(range(10, 10 + DEPTH))
    config = cut(config_of("llama", eos_token_id=ends, architectures=["A"] * DEPTH), 0, 3)
    assert (config.eos_token_id, config.architectures) == (ends, ["A"] * DEPTH)


def test_a_count_of_first_layers_becomes_the_count_of_those_that_are_kept() -> None:
    assert cut(config_of("deepseek_v3", first_k_dense_replace=3), 0, 2, 5).first_k_dense_replace == 2
    assert cut(config_of("deepseek_v3", first_k_dense_replace=3), 4, 5).first_k_dense_replace == 0
    with pytest.raises(DdkError, match=r"keep_layers: first_k_dense_replace of .*DeepseekV3Config.*\[5, 0\]"):
        cut(config_of("deepseek_v3", first_k_dense_replace=3), 5, 0)


def test_qwens_steps_become_a_list() -> None:
    config = cut(config_of("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[3]), 0, 1, 3, 5)
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [0, 2])


def test_attention_scaled_by_layer_number_needs_the_first_layers() -> None:
    assert cut(config_of("gpt2", scale_attn_by_inverse_layer_idx=True), 0, 1, 2).n_layer == 3
    with pytest.raises(DdkError, match="scale_attn_by_inverse_layer_idx"):
        cut(config_of("gpt2", scale_attn_by_inverse_layer_idx=True), 0, 2)


def as_is(rule: Rule) -> Callable[[Any, list[int]], list[bool | None]]:
    return lambda config, numbers: [
        rule.says(number, *(getattr(config, field) for field in rule.fields)) for number in numbers
    ]


class Plain:
    """A configuration of these fields."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@given(st.sampled_from(RULES), st.data())
def test_a_rule_says_of_kept_layers_what_it_said_or_is_refused(rule: Rule, data: st.DataObject) -> None:
    values = data.draw(st.tuples(*[st.integers(0, DEPTH) for _ in rule.fields]))
    keep = data.draw(st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=5))
    config = Plain(**dict(zip(rule.fields, values, strict=True)))
    before = as_is(rule)(config, keep)
    try:
        cut_settings(config, keep, DEPTH)
    except DdkError as refusal:
        assert all(field in str(refusal) for field in rule.fields)
        assert sorted(keep) != list(range(len(keep))) or keep != sorted(keep)  # the first ones need no change
        return
    assert as_is(rule)(config, list(range(len(keep)))) == before
