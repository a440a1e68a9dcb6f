"""Weights that are not there are an error that names them, whoever loads; what is there too much is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch import Tensor

from ddk_pipe.pipeline.errors import LONGEST_REASON, DdkError
from ddk_pipe.pipeline.models import load_causal_lm, model_folder

Weights = dict[str, Tensor]
Edit = Callable[[Weights], Weights]


def put_before(prefix: str) -> Edit:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def leave_out(part: str) -> Edit:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def model(folder: Path, edit: Edit = dict, *, tied: bool = True) -> Path:
    """A small model whose weight file was edited."""
    make_model(folder, vocab_size=50, tie_word_embeddings=tied)
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in edit(load_file(path)).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def load(folder: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = load_causal_lm(folder, field="teacher.model", dtype=torch.float32)
    return loaded


@pytest.mark.parametrize(
    ("edit", "tied", "named"),
    [
        (put_before("_orig_mod."), True, "torch.compile"),
        (put_before("module."), True, "DDP"),
        (put_before("module._orig_mod."), True, "DDP"),
        (put_before("base_model.model."), True, "merge_and_unload"),
        (put_before("student."), True, "student.model.embed_tokens.weight"),
        (leave_out("layers.1."), True, "model.layers.1.input_layernorm.weight"),
        (
            leave_out("layers.2.mlp.down_proj"),
            True,
            "lack 1 tensors that the architecture needs: model.layers.2.mlp.down",
        ),
        (leave_out("norm"), True, "and 4 more"),
        (leave_out("lm_head"), False, "lm_head.weight"),
    ],
)
def test_a_tensor_that_is_not_there_is_named(tmp_path: Path, edit: Edit, tied: bool, named: str) -> None:
    folder = model(tmp_path / "m", edit, tied=tied)
    with pytest.raises(DdkError) as caught:
        load(folder)
    assert str(caught.value).startswith("teacher.model: the weight files in ") and named in str(caught.value)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_there_too_much_is_no_mistake(tmp_path: Path, tied: bool) -> None:
    """Nor is an output layer that is tied, and so not stored."""
    folder = model(
        tmp_path / "m",
        lambda weights: {**weights, "model.layers.0.rotary.inv_freq": torch.ones(3)},
        tied=tied,
    )
    stored = load_file(folder / "model.safetensors")
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, stored.get(name, stored["model.embed_tokens.weight"]))


def test_another_shape_is_named(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(
        DdkError, match=r"do not fit its config.json: .*down_proj.weight is \[32, 64\], not \[32, 48\]"
    ):
        load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-100],
        lambda content: content[:40],
        lambda content: b"",
        lambda content: b"hello, no weights here",
        lambda content: b"PK\x03\x04" + bytes(100),  # what torch.save writes
        lambda content: (2**62).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = model(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DdkError, match=r"model.safetensors is cut short, or no safetensors file"):
        load(folder)


def test_a_shard_that_the_index_names_and_is_not_there(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        DdkError, match=r"model-00002-of-00002.safetensors is missing, and the index names it"
    ):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DdkError, match=r"index.json is damaged"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DdkError, match=f"{name} is a Git LFS pointer, not the file; run `git lfs pull`"):
        model_folder(str(folder), field="teacher.model")


def test_no_causal_language_model_is_a_short_line(tmp_path: Path) -> None:
    """transformers lists every class it knows: 3,126 characters."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=50)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(DdkError, match="is no causal language model") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < LONGEST_REASON
