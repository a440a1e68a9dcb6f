"""Students: built from a model, a configuration or the teacher's layers; saved as ordinary model folders, tokenizer included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import DenseTargets, SparseKdLoss, linear_dense_kd, linear_sparse_kd, measure
from ddk_pipe.pipeline.manifest import Project, Student
from ddk_pipe.pipeline.models import (
    check_causal,
    check_length,
    decoder_of,
    forward_ends_in,
    head_is_plain,
    load_causal_lm,
    load_tokenizer,
    model_folder,
    read_config,
    text_config,
)
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.targets import SparseTargets
from ddk_pipe.pipeline.text import project_tokenizer, tokenizer_digest


class DistillStudent(nn.Module):
    """A causal language model whose forward returns the distillation loss: logits are never held.

    The loss reads the last hidden states and the output layer's weight, so it runs inside the forward,
    where wrappers such as FSDP2 have the weight whole (facts/infrastructure.md). A soft cap of the model's
    configuration (Gemma) is the loss's too.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.softcap = logit_softcap(lm)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        targets: SparseTargets | DenseTargets | None,
        *,
        measuring: bool = False,
        **options: Any,
    ) -> SparseKdLoss | Tensor:
        """tokens, labels int64 [windows, seq_len]; targets of windows * seq_len positions, or None for CE alone.

        `measuring`: the sums of `pipeline.losses.measure` in place of the loss.
        """
        hidden = decoder_of(self.lm)(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        head = self.lm.get_output_embeddings()
        layer: dict[str, Any] = {"bias": getattr(head, "bias", None), "softcap": self.softcap}
        if measuring:
            assert isinstance(targets, SparseTargets)
            return measure(hidden, head.weight, labels.flatten(), targets, **layer, **options)
        if isinstance(targets, DenseTargets):
            return linear_dense_kd(hidden, head.weight, labels.flatten(), targets, **layer, **options)
        return linear_sparse_kd(hidden, head.weight, labels.flatten(), targets, **layer, **options)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's layers."""
        return _layer_list(self.lm, int(text_config(self.lm.config).num_hidden_layers))[2]


def logit_softcap(lm: Any) -> float | None:
    """c > 0 of a model whose logits are c tanh(raw / c) of its output layer's (`final_logit_softcapping`)."""
    cap = getattr(text_config(lm.config), "final_logit_softcapping", None)
    return None if cap is None else float(cap)


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
    if student.model is not None:
        lm, field = (
            _load(project.model(student.model, field="student.model"), student, "student.model"),
            "student.model",
        )
    elif student.config is not None:
        lm, field = _from_config(project, student.config, vocab_size), "student.config"
    else:
        lm, field = _keep_layers(project, student.keep_layers or []), "student.keep_layers"
    check_length(lm.config, project.manifest.seq_len, field=field)
    if lm.get_output_embeddings().weight.shape[0] < vocab_size:
        raise DdkError(
            f"{field}: a vocabulary of {lm.get_output_embeddings().weight.shape[0]:,} is smaller than the teacher's"
            f" {vocab_size:,} ids",
            hint=f"set vocab_size to at least {vocab_size}",
        )
    if not (head_is_plain(lm) if logit_softcap(lm) is None else _head_is_capped(lm)):
        raise DdkError(
            f"{field}: {type(lm).__name__} scales its logits, or does something else to them that the loss does"
            " not do",
            hint="choose a student without logit scaling; final_logit_softcapping is fine",
        )
    check_causal(lm, field=field)
    return lm


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


def _load(name: str, student: Student | None, field: str, *, revision: str | None = None) -> Any:
    trust = student.trust_remote_code if student else False
    folder = model_folder(name, field=field, revision=revision)
    read_config(folder, field=field, trust_remote_code=trust)
    return load_causal_lm(folder, field=field, dtype=torch.float32, trust_remote_code=trust)


def _from_config(project: Project, source: dict[str, Any] | str, vocab_size: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(source, str):
        path = project.path(source, field="student.config")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DdkError(f"student.config: no file {path}", hint="mend the path") from None
        except ValueError:
            raise DdkError(f"student.config: {path} is not JSON", hint="mend the file") from None
    else:
        values = dict(source)
    kind = values.pop("model_type", None)
    if kind is None:
        raise DdkError("student.config: model_type is missing", hint="for example model_type: llama")
    values = {"vocab_size": vocab_size, **values}
    try:
        config = AutoConfig.for_model(kind, **values)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as problem:
        reason = str(problem).split("\n")[0]
        raise DdkError(
            f"student.config: transformers refuses it ({reason})", hint="mend the configuration"
        ) from None


def _keep_layers(project: Project, keep: list[int]) -> Any:
    teacher = project.manifest.teacher
    student = Student(keep_layers=keep, trust_remote_code=teacher.trust_remote_code)
    lm = _load(project.teacher_model, student, "teacher.model", revision=teacher.revision)
    config = text_config(lm.config)
    depth = int(config.num_hidden_layers)
    if max(keep) >= depth:
        raise DdkError(
            f"student.keep_layers: layer {max(keep)} of a teacher with {depth} layers",
            hint=f"use 0 to {depth - 1}",
        )
    parent, name, layers = _layer_list(lm, depth)
    kept = nn.ModuleList([layers[index] for index in keep])
    for position, layer in enumerate(kept):
        for module in layer.modules():  # attention looks up its key-value cache by this number
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]
    setattr(parent, name, kept)
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in keep]
    return lm


def _layer_list(lm: Any, depth: int) -> tuple[nn.Module, str, nn.ModuleList]:
    for parent in decoder_of(lm).modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name, child
    raise DdkError(
        f"student.keep_layers: no list of {depth} layers in {type(lm).__name__}",
        hint="use student.config or student.model",
    )


def shared_tokenizer(project: Project, digest: str) -> Any:
    """The targets' tokenizer, which the student is saved with; a student's own must mean the same by its ids.

    `digest` is that of the tokenizer that the targets were made with. Raises DdkError naming the one that differs.
    """
    student = project.manifest.student
    trust = project.manifest.teacher.trust_remote_code
    loaded = [("tokenizer", project.tokenizer, project_tokenizer(project))]
    if student is not None and student.model is not None:
        name = project.model(student.model, field="student.model")
        own = load_tokenizer(name, field="student.model", trust_remote_code=trust)
        loaded.append(("student.model", name, own))
    for field, name, tokenizer in loaded:
        if tokenizer_digest(tokenizer) != digest:
            raise DdkError(
                f"{field}: the tokenizer of {name} is not the one the cache at {project.cache} was made with",
                hint="use a student with the teacher's tokenizer, or make another cache",
            )
    return loaded[0][2]


def save_student(lm: Any, tokenizer: Any, folder: Path, *, weights: dict[str, Tensor] | None = None) -> None:
    """Write an ordinary Hugging Face model folder; it has its name only once it is whole.

    `weights` by the names of the model's own state, where the model itself holds only shards of them.
    Raises OSError, naming the folder, for a disk that is full.
    """
    partial = durable.partial_name(folder)
    durable.make_folder(folder.parent)
    try:
        lm.config.dtype = torch.float32
        with durable.naming(folder):
            lm.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        for path in partial.iterdir():
            path.chmod(0o644)  # transformers writes the weights for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        durable.publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
