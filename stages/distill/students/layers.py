"""`student.keep_layers`: a model cut to some of its layers, and its configuration with it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import decoder_of, text_config
from ddk_pipe.stages.distill.students.layer_settings import cut_settings

FIELD = "student.keep_layers"
# what a layer knows itself by: attention looks up its key-value cache with it
NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers")  # what some modules copy from their configuration


def keep_layers(lm: Any, keep: list[int]) -> None:
    """Cut the model, in place, to these of its layers, in this order; one named twice is there twice, on its own.

    Raises DdkError for a number beyond its depth, and where the configuration cannot say what the layers are.
    """
    config = text_config(lm.config)
    depth = int(config.num_hidden_layers)
    if max(keep) >= depth:
        raise DdkError(
            f"{FIELD}: layer {max(keep)} of a teacher with {depth} layers", hint=f"use 0 to {depth - 1}"
        )
    parent, _, _ = layer_list(lm, depth)
    cut_settings(config, keep, depth)
    # some keep the parts of a layer in several lists (XLM)
    for name, layers in list(parent.named_children()):
        if isinstance(layers, nn.ModuleList) and len(layers) == depth:
            setattr(parent, name, _kept(layers, keep))
    for module in decoder_of(lm).modules():
        for name in DEPTHS:
            if getattr(module, name, None) == depth:
                setattr(module, name, len(keep))


def _kept(layers: nn.ModuleList, keep: list[int]) -> nn.ModuleList:
    seen: set[int] = set()
    kept = nn.ModuleList()
    for number in keep:
        # a layer named again is a copy: one module in two places would be trained as one, and saved as none
        layer = copy.deepcopy(layers[number]) if number in seen else layers[number]
        seen.add(number)
        kept.append(layer)
    for position, (number, layer) in enumerate(zip(keep, kept, strict=True)):
        for module in layer.modules():
            for name in NUMBERS:
                if getattr(module, name, None) == number:
                    setattr(module, name, position)
    return kept


def layer_list(lm: Any, depth: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The model's list of `depth` layers, with what holds it and under which name; raises DdkError if there is none."""
    for parent in decoder_of(lm).modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name, child
    raise DdkError(
        f"{FIELD}: no list of {depth} layers in {type(lm).__name__}",
        hint="use student.config or student.model",
    )
