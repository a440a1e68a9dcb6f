"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness, the extra `eval`); the only importer of it."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.stages.common import say


def run_tasks(
    model: Any, tokenizer: Any, names: tuple[str, ...], *, folder: Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the tasks, also of groups; metrics carry lm-eval's names, filter included.

    `folder` holds tasks (YAML) of one's own; with data files beside them they need no network. Raises DdkError where
    lm-eval is not installed, for an unknown task, and for data that cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise DdkError("--tasks: lm-eval is not installed", hint=install_hint("eval"))
    if folder is not None and not folder.is_dir():
        raise DdkError(f"--task-folder {folder}: no such folder", hint="name a folder with task files (YAML)")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(folder.absolute()) if folder else None, include_defaults=not _all_in(folder, names)
    )
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise DdkError(
            f"--tasks {unknown[0]}: lm-eval has no such task",
            hint="see `lm-eval ls tasks`, or name --task-folder",
        )
    say(f"evaluate: lm-eval on {', '.join(names)}")
    subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        found = simple_evaluate(
            model=subject,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (
        OSError,
        ConnectionError,
        ValueError,
    ) as problem:  # a data set that is nowhere, a broken task file
        reason = " ".join(str(problem).split())[:300]
        raise DdkError(
            f"--tasks {','.join(names)}: lm-eval fails ({reason})", hint="mend the task or its data"
        ) from None
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _all_in(folder: Path | None, names: tuple[str, ...]) -> bool:
    """True if a file of the folder defines each of them: lm-eval's own thousands need not be read then."""
    if folder is None:
        return False
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.yaml")]
    return all(any(f"task: {name}\n" in text for text in texts) for name in names)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in name
    }
