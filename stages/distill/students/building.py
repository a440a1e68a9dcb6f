"""Students built from a model, a configuration or the teacher's layers, and tried before anything is trained."""

from __future__ import annotations

import json
from typing import Any

import torch

from ddk_pipe.pipeline.errors import DdkError, reason
from ddk_pipe.pipeline.manifest import Manifest, Project, Student, Teacher
from ddk_pipe.pipeline.models import (
    check_causal,
    check_length,
    forward_ends_in,
    head_is_plain,
    keeps_documents_apart,
    load_causal_lm,
    mend_generation,
    model_folder,
    read_config,
    text_config,
)
from ddk_pipe.stages.common import say
from ddk_pipe.stages.distill.students.layers import keep_layers
from ddk_pipe.stages.distill.students.module import logit_softcap
from ddk_pipe.stages.distill.students.vocabulary import padded, rows_in_checkpoint, silence


def build_student(project: Project, *, vocab_size: int, seed: int) -> Any:
    """The student's model with its first weights, float32 on the CPU.

    Raises DdkError if it cannot be built, is too short for seq_len, or lacks ids that the cache holds.
    """
    student = project.manifest.student
    if student is None:
        raise DdkError(
            "student: missing", hint="add student: {keep_layers: [...]}, {model: ...} or {config: ...}"
        )
    torch.manual_seed(seed)
    field, _ = origin(student, project.manifest.teacher)
    lm = _first_weights(project, student, vocab_size)
    check_length(lm.config, project.manifest.seq_len, field=field)
    if lm.get_output_embeddings().weight.shape[0] < vocab_size:
        raise DdkError(
            f"{field}: a vocabulary of {lm.get_output_embeddings().weight.shape[0]:,} is smaller than the teacher's"
            f" {vocab_size:,} ids",
            hint=f"set vocab_size to at least {vocab_size}",
        )
    _try_out(lm, field)
    if getattr(lm, "generation_config", None) is not None:
        dropped = mend_generation(lm.generation_config, field=field)
        if dropped:
            say(
                f"distill: the student's generation_config.json goes without {', '.join(dropped)}: no use as it is set"
            )
    return lm


def origin(student: Student, teacher: Teacher) -> tuple[str, bool]:
    """The manifest's field that the student is of, and whether code that comes with its model may be run."""
    if student.model is not None:
        return "student.model", student.trust_remote_code
    if student.config is not None:
        return "student.config", False
    return "student.keep_layers", teacher.trust_remote_code


def needs_rows_apart(lm: Any, manifest: Manifest, *, sharded: bool) -> bool:
    """True of a student that sees from one document of a window into the next, where it must not (tried on the model).

    Raises DdkError for one in shards (FSDP2), whose processes must all run it equally often.
    """
    if manifest.attention == "window" or keeps_documents_apart(lm):
        return False
    assert manifest.student is not None
    field, _ = origin(manifest.student, manifest.teacher)
    sees = f"{type(lm).__name__} does not keep documents of a window apart"
    if sharded:
        raise DdkError(
            f"{field}: {sees}, and a student in shards cannot run them one by one",
            hint="set distill.parallel: ddp, or attention: window",
        )
    say(f"distill: {sees}; each has a row of its own")
    return True


def _first_weights(project: Project, student: Student, vocab_size: int) -> Any:
    teacher = project.manifest.teacher
    field, trust = origin(student, teacher)
    if student.model is not None:
        return _load(project.model(student.model, field=field), field, trust_remote_code=trust)
    if student.config is not None:
        return _fresh(project, student.config, vocab_size)
    lm = _load(project.teacher_model, "teacher.model", trust_remote_code=trust, revision=teacher.revision)
    keep_layers(lm, student.keep_layers or [])
    return lm


def _try_out(lm: Any, field: str) -> None:
    """Raises DdkError for a model that cannot be run, that the loss does not fit, or that sees tokens to come."""
    try:
        plain = head_is_plain(lm) if logit_softcap(lm) is None else _head_is_capped(lm)
        if plain:
            check_causal(lm, field=field)
    except DdkError:
        raise
    except Exception as problem:
        raise DdkError(
            f"{field}: {type(lm).__name__} cannot be run on eight tokens ({type(problem).__name__}: {reason(problem)})",
            hint="choose other layers, or another student",
        ) from problem
    if not plain:
        raise DdkError(
            f"{field}: {type(lm).__name__} scales its logits, or does something else to them that the loss does"
            " not do",
            hint="choose a student without logit scaling; final_logit_softcapping is fine",
        )


def _head_is_capped(lm: Any) -> bool:
    """True if the model's own forward returns the output layer's logits soft-capped, and does nothing more.

    Tried at a cap of 1 in place of the model's: random weights give logits that no usual cap would bend.
    """
    config, head = text_config(lm.config), lm.get_output_embeddings()
    cap = config.final_logit_softcapping
    config.final_logit_softcapping = 1.0
    try:
        return forward_ends_in(lm, lambda states: head(states).float().tanh())
    finally:
        config.final_logit_softcapping = cap


def _load(name: str, field: str, *, trust_remote_code: bool, revision: str | None = None) -> Any:
    folder = model_folder(name, field=field, revision=revision)
    read_config(folder, field=field, trust_remote_code=trust_remote_code)
    return load_causal_lm(folder, field=field, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _fresh(project: Project, source: dict[str, Any] | str, vocab_size: int) -> Any:
    """Random weights. Where the configuration leaves the vocabulary open: `vocab_size` ids, padded; without padding
    where the run has a checkpoint from before there was any."""
    values = _configuration(project, source)
    if "vocab_size" in values:
        return _from_config(values)
    state = torch.random.get_rng_state()
    lm = _from_config({**values, "vocab_size": padded(vocab_size)})
    if rows_in_checkpoint(lm, project.run / "checkpoints") == vocab_size:
        torch.random.set_rng_state(state)
        return _from_config({**values, "vocab_size": vocab_size})
    silence(lm, vocab_size)
    return lm


def _configuration(project: Project, source: dict[str, Any] | str) -> dict[str, Any]:
    """The values of student.config; raises DdkError for a file that cannot be read."""
    if isinstance(source, str):
        path = project.path(source, field="student.config")
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DdkError(f"student.config: no file {path}", hint="mend the path") from None
        except ValueError:
            raise DdkError(f"student.config: {path} is not JSON", hint="mend the file") from None
        return values
    return dict(source)


def _from_config(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(values)
    kind = values.pop("model_type", None)
    if kind is None:
        raise DdkError("student.config: model_type is missing", hint="for example model_type: llama")
    try:
        config = AutoConfig.for_model(kind, **values)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as problem:
        reason = str(problem).split("\n")[0]
        raise DdkError(
            f"student.config: transformers refuses it ({reason})", hint="mend the configuration"
        ) from None
