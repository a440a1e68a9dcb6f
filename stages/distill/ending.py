"""The end of a run: its student saved, the best one too where one is kept, and its summary, run.json."""

from __future__ import annotations

import functools
from pathlib import Path, PurePath
from typing import Any

import torch

import ddk_pipe
from ddk_pipe.pipeline.losses import chosen_implementation
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import peak_memory_bytes, read_student_record, say, write_student_record
from ddk_pipe.stages.distill.identity import Identity
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.schedules import stable_steps
from ddk_pipe.stages.distill.students import save_student

MOST_NAME = 1000  # characters


def finish(parts: Parts, position: Position, identity: Identity) -> dict[str, Any]:
    """Save the student, then run.json, which marks the run as finished, and remove the checkpoints; returns the summary."""
    student = _save_student(parts, "student", identity)
    best = _save_best(parts, position, identity)
    tokens = position.step * parts.tokens_per_step
    summary = {
        "settings": position.settings,
        "steps": position.step,
        "tokens": tokens,
        "seconds": position.seconds,
        "tokens_per_second": tokens / max(position.seconds, 1e-9),
        "parameters": sum(parameter.numel() for parameter in parts.student.parameters()),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": _peak_device_memory(parts.device),
        "processes": parts.world.size,
        "parallel": parts.options.parallel if parts.world.distributed else None,
        "loss": _loss(parts),
        "stopped_by_gap": position.finished,
        "best_step": best,
        "warnings": position.warnings,
        "cache_fingerprint": parts.source.fingerprint,
        "tokenizer_digest": parts.source.tokenizer_digest,
        "student": student,  # as the file beside its weights says
        "manifest": parts.project.manifest.model_dump(mode="json"),
        "versions": _versions(),
    }
    if parts.world.leads:
        durable.write_file(parts.project.run / "run.json", durable.to_json(summary))
    parts.checkpoints.clear()
    say(f"distill: the student is at {parts.project.run / 'student'}")
    if stable_steps(parts.options) and parts.world.leads and (found := parts.checkpoints.found()):
        say(f"distill: {found[-1].folder} is kept, for a run that is to have more steps (distill.steps)")
    return summary


def _save_student(parts: Parts, name: str, identity: Identity) -> dict[str, Any] | None:
    """Returns the record that lies beside its weights; None on processes other than the first."""
    weights = parts.wrapped.weights()
    if not parts.world.leads:
        return None
    folder = parts.project.run / name
    facts = _origin(parts, identity)
    write = functools.partial(write_student_record, facts=facts)
    save_student(parts.student.lm, parts.tokenizer, folder, weights=weights, record=write)
    return read_student_record(folder)


def _origin(parts: Parts, identity: Identity) -> dict[str, Any]:
    """What a student is made of, for its record: no path of this machine is in it, for it is given away."""
    made_of = identity.made_of
    weights = made_of["cache"]["teacher"].get("weights_digest") if "cache" in made_of else made_of["teacher"]
    return {
        "teacher": _teacher_name(parts.project),
        "teacher_weights": weights,
        "cache_fingerprint": parts.source.fingerprint,
        "tokenizer_digest": parts.source.tokenizer_digest,
        "started_from": made_of["student"],
        "ids": parts.source.vocab_size,  # rows of the output layer beyond them are padding
        "settings": identity.settings_digest,
    }


def _teacher_name(project: Project) -> str:
    """The hub id, or the folder's own name."""
    model = project.teacher_model
    is_folder = model.startswith(("/", "~", "./", "../")) or Path(model).is_dir()
    name = PurePath(model).name if is_folder else model
    return "".join(letter for letter in name if letter.isprintable())[:MOST_NAME]


def _save_best(parts: Parts, position: Position, identity: Identity) -> int | None:
    """Save the best checkpoint's student as best/, if one is kept and it is not the last; returns its step."""
    if not parts.options.keep_best:
        return None
    parts.world.wait()
    best = parts.checkpoints.best(parts.checkpoints.found())
    if best is None or best.step == position.step:
        return position.step
    parts.checkpoints.load(best)
    _save_student(parts, "best", identity)
    return best.step


def _loss(parts: Parts) -> str | None:
    """What computed it: `pipeline.losses.chosen_implementation`; None where a teacher was in memory."""
    options = parts.options
    if options.targets == "online":
        return None
    return chosen_implementation(
        parts.device,
        parts.compute_dtype(),
        temperature=options.temperature,
        direction=options.direction,
        softcap=parts.student.softcap,
    )


def _peak_device_memory(device: torch.device) -> int | None:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def _versions() -> dict[str, str]:
    import transformers

    return {
        "ddk_pipe": ddk_pipe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
