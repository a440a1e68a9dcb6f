"""The proof, before the first step, that a student saved and read back is the student that is trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.models import load_causal_lm, load_tokenizer, probe_logits, read_config
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.text import tokenizer_digest
from ddk_pipe.stages.distill.students.saving import save_student

# Of the largest logit: the same float32 weights and code on the same machine, so that only the order of sums differs.
TOLERANCE = 1e-5
SIMPLE = (bool, int, float, str, type(None))
# What two copies of one model may differ in; the last is Gemma 4's, of keys and values that other layers are to share.
OWN = ("training", "name_or_path", "store_full_length_kv")


def prove_saved(lm: Any, tokenizer: Any, place: Path, *, field: str, trust_remote_code: bool = False) -> None:
    """Save the student as at the end of a run, read it back as a stranger would, and compare: every tensor, what each
    module was told (windows longer than eight tokens), the logits of eight tokens, the tokenizer.

    `lm` is on the CPU, in float32. The folder is hidden, beside `place`, and is gone afterwards; so is what was drawn
    at random. Raises DdkError, naming `field`, for a student that cannot be written or is read back as another.
    """
    folder = durable.partial_name(place)
    options: dict[str, Any] = {"field": field, "trust_remote_code": trust_remote_code}
    try:
        with torch.random.fork_rng(devices=[]):
            _save(lm, tokenizer, folder, field=field)
            difference = next(_differences(lm, tokenizer, folder, options), None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if difference is not None:
        raise DdkError(
            f"{field}: {type(lm).__name__} saved and read back is another model than the one to be trained: {difference}",
            hint="choose other layers, or another student",
        )


def _save(lm: Any, tokenizer: Any, folder: Path, *, field: str) -> None:
    try:
        save_student(lm, tokenizer, folder)
    except (DdkError, OSError):  # a disk that is full
        raise
    except Exception as problem:
        raise DdkError(
            f"{field}: {type(lm).__name__} cannot be saved ({reason(problem)})",
            hint="mend the model's folder, or use another student",
        ) from problem


def _differences(lm: Any, tokenizer: Any, folder: Path, options: dict[str, Any]) -> Iterator[str]:
    try:
        read_config(folder, **options)
        back = load_causal_lm(folder, dtype=torch.float32, **options)
        reread = load_tokenizer(str(folder), **options)
        mine, theirs = probe_logits(lm), probe_logits(back)
    except DdkError as problem:  # the folder is gone when this is read
        yield (
            problem.message.replace(f" in {folder}", "")
            .replace(str(folder), "it")
            .removeprefix(f"{options['field']}: ")
        )
        return
    yield from _other_tensors(lm, back)
    yield from _other_settings(lm, back)
    error, largest = float((mine - theirs).abs().max()), float(mine.abs().max())
    if error > TOLERANCE * max(largest, 1.0):
        yield f"logits of eight tokens differ by {error:.2g}"
    if tokenizer_digest(reread) != tokenizer_digest(tokenizer):
        yield f"its tokenizer is read as {type(reread).__name__}, which makes other tokens of text"


def _other_tensors(mine: Any, theirs: Any) -> Iterator[str]:
    """Those that are saved, and those that each makes of its configuration, where both have them."""
    saved, back = mine.state_dict(), theirs.state_dict()
    for name in sorted(saved.keys() ^ back.keys()):
        yield f"{name} is in one of them alone"
    saved |= dict(mine.named_buffers())
    back |= dict(theirs.named_buffers())
    for name in sorted(saved.keys() & back.keys()):
        if saved[name].shape != back[name].shape:
            yield f"{name} is {list(back[name].shape)}, not {list(saved[name].shape)}"
        elif not torch.allclose(saved[name], back[name], rtol=0, atol=0, equal_nan=True):
            yield f"{name} has other values"


def _other_settings(mine: Any, theirs: Any) -> Iterator[str]:
    """What modules were told when they were made, as far as it is plain values that both know."""
    others = dict(theirs.named_modules())
    for name, module in mine.named_modules():
        told, back = _told(module), _told(others[name]) if name in others else {}
        for setting in sorted(told.keys() & back.keys()):
            if told[setting] != back[setting]:
                yield f"{setting} of {name or 'the model'} is {back[setting]}, not {told[setting]}"


def _told(module: Any) -> dict[str, str]:
    return {
        name: repr(value)  # NaN is told as NaN
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in OWN and isinstance(value, SIMPLE)
    }
