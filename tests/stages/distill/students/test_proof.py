"""The student is saved, read back and compared before the first step; what differs is one line, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import load_project
from ddk_pipe.stages.distill import distill
from ddk_pipe.stages.distill.students import prove_saved

FIELD = "student.config"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return make_tokenizer(tmp_path / "tokenizer")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=None, **sizes))


def prove(lm: Any, tokenizer: Any, folder: Path) -> None:
    prove_saved(lm, tokenizer, folder / "runs" / "one", field=FIELD)


def test_a_sound_student_passes_and_leaves_nothing_but_its_weights_and_the_random_state(
    tokenizer: Any, tmp_path: Path
) -> None:
    lm = llama().train()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    prove(lm, tokenizer, tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and lm.training
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert list((tmp_path / "runs").iterdir()) == []


def other_epsilon(lm: Any) -> None:
    lm.model.layers[1].input_layernorm.variance_epsilon = 0.5


def without_a_layer(lm: Any) -> None:
    lm.config.num_hidden_layers = 1


def with_another_layer(lm: Any) -> None:
    lm.config.num_hidden_layers = 3


def other_activation(lm: Any) -> None:
    lm.model.layers[0].mlp.act_fn = torch.nn.Tanh()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (other_epsilon, "variance_epsilon of model.layers.1.input_layernorm is 1e-06, not 0.5"),
        (without_a_layer, r"model.layers.1.*is in one of them alone"),
        (with_another_layer, r"the weight files lack 9 tensors .*model.layers.2"),
        (other_activation, "logits of eight tokens differ"),
    ],
)
def test_another_model_than_the_one_in_memory_is_told_by_what_differs(
    spoil: Callable[[Any], None], told: str, tokenizer: Any, tmp_path: Path
) -> None:
    lm = llama()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(20)  # at first predictions hardly depend on what is inside
    spoil(lm)
    with pytest.raises(
        DdkError, match=f"{FIELD}: LlamaForCausalLM saved and read back is another model.*{told}"
    ) as caught:
        prove(lm, tokenizer, tmp_path)
    assert ".partial" not in str(caught.value), "names a folder that is gone"
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_setting_that_eight_tokens_do_not_show(tokenizer: Any, tmp_path: Path) -> None:
    lm = llama()
    lm.model.layers[1].self_attn.attention_dropout = 0.25
    with pytest.raises(DdkError, match=r"attention_dropout of model.layers.1.self_attn is 0.0, not 0.25"):
        prove(lm, tokenizer, tmp_path)


def test_tensors_that_are_shared_cannot_be_saved(tokenizer: Any, tmp_path: Path) -> None:
    lm = llama()
    lm.model.layers[1].mlp = lm.model.layers[0].mlp
    with pytest.raises(DdkError, match=f"{FIELD}: LlamaForCausalLM (cannot be saved|saved and read back)"):
        prove(lm, tokenizer, tmp_path)


def test_a_run_is_refused_before_its_first_step_and_begins_once_that_is_mended(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("some tensors share memory")

    project = load_project(cached)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", fails)
        with pytest.raises(
            DdkError, match=r"student.keep_layers: .* cannot be saved \(some tensors share memory\)"
        ):
            distill(project)
    assert {path.name for path in project.run.iterdir()} == {"lock", "identity.json"}
    other = load_project(cached, ["student.keep_layers=[1]", "distill.steps=1"])
    assert distill(other)["steps"] == 1
