"""Causal language models, loaded whole: a tensor that the files lack is an error, never drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.models.configs import be_quiet
from ddk_pipe.pipeline.models.files import check_weight_files

NAMED = 3  # tensors, of many that are missing
WRAPPERS = {  # what puts these in front of every name -> how to save without
    "_orig_mod.": "torch.compile: save the model it wraps (model._orig_mod)",
    "module.": "DataParallel or DDP: save the model it wraps (model.module)",
    "_fsdp_wrapped_module.": "FSDP: gather a full state dict before saving",
    "_forward_module.": "DeepSpeed or Fabric: save the model it wraps",
    "base_model.model.": "PEFT: merge the adapters first (merge_and_unload)",
}


def load_causal_lm(
    folder: Path, *, field: str, dtype: Any, trust_remote_code: bool = False, device_map: str | None = None
) -> Any:
    """The model of a folder as transformers' AutoModelForCausalLM, in `dtype` (a torch dtype), from safetensors alone.

    Raises DdkError, naming `field`, the folder and the tensors, if the files lack a tensor that the architecture needs
    or hold it in another shape; for damaged files; and for a model that cannot be loaded (a format whose package is
    missing). What the files hold beyond that is no mistake.
    """
    from transformers import AutoModelForCausalLM

    be_quiet()
    check_weight_files(folder, field=field)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    except Exception as problem:
        raise _cannot_be_loaded(folder, problem, field=field) from problem
    _check_shapes(folder, found["mismatched_keys"], field=field)
    _check_missing(folder, found["missing_keys"], found["unexpected_keys"], field=field)
    return model


def _cannot_be_loaded(folder: Path, problem: Exception, *, field: str) -> DdkError:
    said = reason(problem)
    if "Unrecognized configuration class" in said:
        return DdkError(
            f"{field}: {folder} is no causal language model ({said.partition(' for this kind')[0]})",
            hint="name a decoder that transformers has as AutoModelForCausalLM",
        )
    return DdkError(f"{field}: {folder} cannot be loaded ({said})", hint="install or mend what it names")


def _check_shapes(folder: Path, mismatched: Iterable[tuple[Any, ...]], *, field: str) -> None:
    wrong = sorted((str(name), tuple(there), tuple(wanted)) for name, there, wanted in mismatched)
    if wrong:
        name, there, wanted = wrong[0]
        raise DdkError(
            f"{field}: the weights in {folder} do not fit its config.json: {name} is {list(there)},"
            f" not {list(wanted)}{_and_more(len(wrong) - 1)}",
            hint="use the configuration that the weights were saved with",
        )


def _check_missing(folder: Path, missing: Iterable[str], unexpected: Iterable[str], *, field: str) -> None:
    lacking = sorted(missing)
    if not lacking:
        return
    named = ", ".join(lacking[:NAMED])
    raise DdkError(
        f"{field}: the weight files in {folder} lack {len(lacking):,} tensors that the architecture needs: {named}"
        f"{_and_more(len(lacking) - NAMED)}",
        hint=_why(sorted(unexpected)),
    )


def _why(unexpected: list[str]) -> str:
    """What to do about it, as far as the names that are there tell."""
    for wrapper, how in WRAPPERS.items():
        if unexpected and all(name.startswith(wrapper) for name in unexpected):
            return f"their names begin with {wrapper!r}, left by {how}"
    if unexpected:
        return f"they hold other names, such as {unexpected[0]}; save the model with its own save_pretrained"
    return "download them again, or save the whole model with save_pretrained"


def _and_more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""
