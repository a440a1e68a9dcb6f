"""`ddk-pipe export`: a run's student as a model folder to give away, with a model card filled from the record."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import ddk_pipe
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import (
    be_quiet,
    load_causal_lm,
    load_tokenizer,
    mend_generation,
    model_folder,
    read_config,
)
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.text import tokenizer_digest
from ddk_pipe.stages.common import RunRecord, check_student, load_run, say, write_student_record
from ddk_pipe.stages.export.card import CardOptions, card

EXPORTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Target:
    """Where the export goes, and in which number type."""

    folder: Path
    dtype: str = "float32"
    push: str | None = None  # "user/name" on the hub
    public: bool = False

    def check(self) -> None:
        """Raises DdkError for what cannot be; nothing is read before."""
        if self.dtype not in DTYPES:
            raise DdkError(f"--dtype {self.dtype}: unknown", hint=f"use one of {', '.join(DTYPES)}")
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
            raise DdkError(f"{self.folder}: exists already", hint="name a new folder with --to")


def export(place: Path, target: Target, options: CardOptions) -> Path:
    """Write the model folder: weights (safetensors), tokenizer, generation config, README.md.

    Raises DdkError for a run that is not finished, weights that are not those that it saved, a folder that exists, and,
    before anything is written, for a push without a licence or a login.
    """
    target.check()
    run = load_run(place)
    student = place / "student"
    if not run.finished or not student.is_dir():
        raise DdkError(
            f"{place}: not finished, so there is no student", hint="run `ddk-pipe distill` to its end"
        )
    api = _logged_in(target, options) if target.push else None
    durable.make_folder(target.folder.absolute().parent)
    partial = durable.partial_name(target.folder.absolute())
    try:
        _write(run, student, partial, target, options)
        if target.folder.is_dir():
            target.folder.rmdir()  # empty
        durable.publish_folder(partial, target.folder.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"export: {target.folder}")
    if api is not None:
        _push(api, target)
    return target.folder


def _write(run: RunRecord, student: Path, folder: Path, target: Target, options: CardOptions) -> None:
    be_quiet()
    _refuse_links(student)
    model_folder(str(student.absolute()), field="the student")
    read_config(student, field="the student")
    tokenizer = load_tokenizer(str(student), field="the student")
    record = check_student(student, run.summary)
    if record is not None and tokenizer_digest(tokenizer) != record["tokenizer_digest"]:
        raise DdkError(
            f"{student}: its tokenizer is not the one that the run saved",
            hint="bring its files back, or train again",
        )
    if target.dtype == "float32":
        shutil.copytree(student, folder, ignore=_not_the_model)
    else:
        _save_as(student, folder, target.dtype)
        tokenizer.save_pretrained(folder)
    _generation_config(student, tokenizer).save_pretrained(folder)
    if record is not None:  # of the weights as they are given away
        record = write_student_record(folder, record)
    (folder / "README.md").write_text(card(run, options, target.dtype, record), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def _refuse_links(student: Path) -> None:
    """A link could lead to anything on this machine, and what is exported is given away."""
    for path in [student, *student.rglob("*")]:
        if path.is_symlink():
            raise DdkError(f"{path}: a link, which is not exported", hint="put the file itself there")


def _not_the_model(folder: str, names: list[str]) -> set[str]:
    """What is no part of a model (pickles, notes): left behind."""
    return {
        name
        for name in names
        if not (Path(folder) / name).is_dir() and not any(fnmatch(name, pattern) for pattern in EXPORTED)
    }


def _save_as(student: Path, folder: Path, dtype: str) -> None:
    import torch

    model = load_causal_lm(student, field="the student", dtype=getattr(torch, dtype))
    if getattr(model, "generation_config", None) is not None:
        mend_generation(model.generation_config, field="the student")  # said where it is written
    model.save_pretrained(folder)


def _generation_config(student: Path, tokenizer: Any) -> Any:
    """The student's own, and the tokenizer's ids where it names none: generation must know where to end.

    What transformers refuses to save is left out, and said.
    """
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(student)
    except (RecursionError, TypeError, ValueError, AttributeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise DdkError(
            f"{student}/generation_config.json cannot be used ({reason})", hint="mend or delete it"
        ) from None
    except OSError:
        config = GenerationConfig.from_model_config(read_config(student, field="the student"))
    dropped = mend_generation(config, field="the student")
    if dropped:
        say(f"export: generation_config.json goes without {', '.join(dropped)}: no use as it is set")
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return config


def _logged_in(target: Target, options: CardOptions) -> Any:
    """The hub's interface, of a user who may write there."""
    from huggingface_hub import HfApi

    if options.licence is None:
        raise DdkError("--push without --license", hint="say under which licence others may use the student")
    api = HfApi(library_name="ddk-pipe", library_version=ddk_pipe.__version__)
    try:
        api.whoami()
    except Exception as problem:  # noqa: BLE001 - no token, a wrong one, no network: the library has many kinds
        reason = " ".join(str(problem).split())[:200]
        raise DdkError(
            f"--push {target.push}: not logged in ({reason})", hint="run `hf auth login`"
        ) from None
    return api


def _push(api: Any, target: Target) -> None:
    try:
        api.create_repo(target.push, private=not target.public, exist_ok=True)
        address = api.upload_folder(
            repo_id=target.push, folder_path=target.folder, commit_message="ddk-pipe export"
        )
    except Exception as problem:  # noqa: BLE001 - the same
        reason = " ".join(str(problem).split())[:200]
        raise DdkError(
            f"--push {target.push}: the hub refused it ({reason})",
            hint=f"mend that and upload {target.folder} with `hf upload`",
        ) from None
    say(f"export: {address}")
