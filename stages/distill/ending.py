"""The end of a run: its student saved, the best one too where one is kept, and its summary, run.json."""

from __future__ import annotations

from typing import Any

import torch

import ddk_pipe
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import peak_memory_bytes, say
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.students import save_student


def finish(parts: Parts, position: Position) -> dict[str, Any]:
    """Save the student, then run.json, which marks the run as finished, and remove the checkpoints; returns the summary."""
    _save_student(parts, "student")
    best = _save_best(parts, position)
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
        "stopped_by_gap": position.finished,
        "best_step": best,
        "warnings": position.warnings,
        "cache_fingerprint": parts.source.fingerprint,
        "tokenizer_digest": parts.source.tokenizer_digest,
        "manifest": parts.project.manifest.model_dump(mode="json"),
        "versions": _versions(),
    }
    if parts.world.leads:
        durable.write_file(parts.project.run / "run.json", durable.to_json(summary))
    parts.checkpoints.clear()
    say(f"distill: the student is at {parts.project.run / 'student'}")
    return summary


def _save_student(parts: Parts, name: str) -> None:
    weights = parts.wrapped.weights()
    if parts.world.leads:
        save_student(parts.student.lm, parts.tokenizer, parts.project.run / name, weights=weights)


def _save_best(parts: Parts, position: Position) -> int | None:
    """Save the best checkpoint's student as best/, if one is kept and it is not the last; returns its step."""
    if not parts.options.keep_best:
        return None
    parts.world.wait()
    best = parts.checkpoints.best(parts.checkpoints.found())
    if best is None or best.step == position.step:
        return position.step
    parts.checkpoints.load(best)
    _save_student(parts, "best")
    return best.step


def _peak_device_memory(device: torch.device) -> int | None:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def _versions() -> dict[str, str]:
    import transformers

    return {
        "ddk_pipe": ddk_pipe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
