"""Students as ordinary model folders, tokenizer included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.models import load_tokenizer
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.text import project_tokenizer, tokenizer_digest


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


def save_student(
    lm: Any,
    tokenizer: Any,
    folder: Path,
    *,
    weights: dict[str, Tensor] | None = None,
    record: Callable[[Path], object] | None = None,
) -> None:
    """Write an ordinary Hugging Face model folder; it has its name only once it is whole.

    `weights` by the names of the model's own state, where the model itself holds only shards of them. `record` is
    called with the folder before it has its name, to put a file beside the weights.
    Raises OSError, naming the folder, for a disk that is full.
    """
    partial = durable.partial_name(folder)
    durable.make_folder(folder.parent)
    try:
        lm.config.dtype = torch.float32
        with durable.naming(folder):
            lm.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        if record is not None:
            record(partial)
        for path in partial.iterdir():
            path.chmod(0o644)  # transformers writes the weights for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        durable.publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
