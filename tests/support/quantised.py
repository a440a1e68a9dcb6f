"""A tiny quantised teacher in a format that both engines read: compressed-tensors, int8 weights and activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INPUT_STEP = (
    4 / 127
)  # of all activations: stored with the weights, so engines that use it round at the same places
LEVEL = 3  # largest weight of a row: so coarse that what 16 bits and other steps of activations change is little to it
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}


def quantise(folder: Path, *, dynamic: bool = False) -> Path:
    """The model in `folder` with every linear layer but the head in int8: a scale for each row, one for its input.

    `dynamic`: the input's scale is taken from each token itself in place of the stored one.
    """
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / LEVEL
        layer = name.removesuffix(".weight")
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[f"{layer}.weight_scale"] = scale
        if not dynamic:
            weights[f"{layer}.input_scale"] = torch.tensor([INPUT_STEP])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    inputs = {**INT8, "strategy": "tensor"} if not dynamic else {**INT8, "strategy": "token", "dynamic": True}
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**INT8, "strategy": "channel"},
                "input_activations": inputs,
            }
        },
    }
    return say_quantised(folder, config)


def say_quantised(folder: Path, how: dict[str, Any]) -> Path:
    """Only the word of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return folder
