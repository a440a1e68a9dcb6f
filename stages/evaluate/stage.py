"""`ddk-pipe evaluate`: how well a student predicts, from the cached validation windows and from lm-eval's tasks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ddk_pipe
from ddk_pipe.pipeline.cache import CachedWindow, CacheReader, read_spec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import N_SUMS, summary
from ddk_pipe.pipeline.models import (
    be_quiet,
    head_is_plain,
    keeps_documents_apart,
    load_causal_lm,
    load_tokenizer,
    model_folder,
    read_config,
)
from ddk_pipe.pipeline.storage import Folder, durable, open_folder
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.pipeline.text import VALIDATION, tokenizer_digest
from ddk_pipe.stages.common import (
    EVALUATION,
    RunRecord,
    check_student,
    evaluation_tables,
    is_run,
    load_run,
    perplexity,
    pick_device,
    say,
    show_table,
    track,
)
from ddk_pipe.stages.distill import BatchMaker, DistillStudent, logit_softcap, teacher_ce
from ddk_pipe.stages.evaluate.origin import say_if_another

Result = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to evaluate by; see the command's help."""

    cache: str | None = None  # none: the run's own
    windows: int | None = None  # validation windows per domain; none: all
    tasks: tuple[str, ...] = ()  # of lm-eval
    task_folder: Path | None = None  # with tasks of one's own
    limit: int | None = None  # examples per task
    device: str = "auto"
    batch_windows: int = 4


def evaluate(place: Path, request: Request | None = None) -> Result:
    """Evaluate a run's student, or any model folder (then `cache` names the cache); print and, for a run, keep it.

    What is kept joins what was found earlier: {"builtin": ..., "tasks": {task: {metric: value}}, "versions": ...}.
    Raises DdkError for a run without a student, weights that are not those that it saved, another tokenizer than the
    cache's, an unknown task.
    """
    request = request or Request()
    run = load_run(place) if is_run(place) else None
    if run is not None and not (place / "student").is_dir():
        raise DdkError(
            f"{place}: not finished, so there is no student", hint="run `ddk-pipe distill` to its end"
        )
    student = place / "student" if run else place
    folder = model_folder(str(student.absolute()), field="STUDENT")
    cache = _cache(place, run, request)
    be_quiet()
    read_config(folder, field="STUDENT")
    tokenizer = load_tokenizer(str(folder), field="STUDENT")
    record = check_student(folder, run.summary if run else None)
    if cache is not None:
        say_if_another(place, record, read_spec(cache), cache.name)
    model = load_causal_lm(folder, field="STUDENT", dtype=torch.float32)
    model.to(pick_device(request.device)).eval()
    found: Result = {"versions": {"ddk_pipe": ddk_pipe.__version__, "torch": torch.__version__}}
    if cache is not None:
        temperature = run.manifest.distill.temperature if run and run.manifest else None
        found["builtin"] = builtin(model, tokenizer, cache, request, temperature)
    if request.tasks:
        from ddk_pipe.stages.evaluate.tasks import run_tasks

        found["tasks"] = run_tasks(
            model, tokenizer, request.tasks, folder=request.task_folder, limit=request.limit
        )
    _show(place, found)
    return _keep(run, found) if run else found


def _cache(place: Path, run: RunRecord | None, request: Request) -> Folder | None:
    if request.cache is not None:
        return open_folder(request.cache)
    if run is not None:
        return run.cache()
    if request.tasks:
        return None  # the tasks alone
    raise DdkError(f"{place}: a model folder, and no cache to evaluate it by", hint="name one with --cache")


def builtin(
    model: Any, tokenizer: Any, cache: Folder, request: Request, temperature: float | None = None
) -> Result:
    """Per domain, on its cached validation windows; CE in nats per token.

    bits_per_byte is the CE in bits over the UTF-8 bytes of the labels' text; the end-of-document token is paid for and
    has no bytes. teacher_agreement compares the two most likely tokens; where the cache holds draws alone the heaviest
    draw stands for the teacher's. calibration_error (ECE) is in 15 bins of confidence.
    """
    spec = read_spec(cache)
    if tokenizer_digest(tokenizer) != spec.tokenizer_digest:
        raise DdkError(
            f"STUDENT: its tokenizer is not the one the cache at {cache.name} was made with",
            hint="evaluate a student of this cache's teacher, or name another --cache",
        )
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < spec.vocab_size:
        raise DdkError(
            f"STUDENT: a vocabulary of {rows:,}, the cache at {cache.name} holds {spec.vocab_size:,} ids",
            hint="evaluate a student of this cache's teacher, or name another --cache",
        )
    if logit_softcap(model) is None and not head_is_plain(model):
        raise DdkError(
            f"STUDENT: {type(model).__name__} scales its logits", hint="use --tasks without a cache for it"
        )
    used = temperature or (1.0 if 1.0 in spec.plan.temperatures else spec.plan.temperatures[0])
    reader = CacheReader(cache, used)
    sizes = {domain: reader.size(domain, VALIDATION).windows for domain in spec.domains}
    wanted = {domain: min(size, request.windows or size) for domain, size in sizes.items()}
    apart = spec.attention == "document" and not keeps_documents_apart(model)
    student, out = DistillStudent(model, apart=apart), dict[str, Result]()
    with track("evaluate", sum(wanted.values()), "windows") as advance:
        for domain, count in wanted.items():
            windows = [reader.read(domain, VALIDATION, window) for window in range(count)]
            out[domain] = _domain(student, tokenizer, windows, request, used, exact=spec.plan.has_tail)
            advance(count, domain)
    return {"cache_fingerprint": spec.fingerprint, "temperature": used, "domains": out}


def _domain(
    student: DistillStudent,
    tokenizer: Any,
    windows: list[CachedWindow],
    request: Request,
    temperature: float,
    *,
    exact: bool,
) -> Result:
    sums = torch.zeros(N_SUMS, dtype=torch.float64)
    make_batch = BatchMaker.of(student)
    for start in range(0, len(windows), request.batch_windows):
        batch = make_batch(windows[start : start + request.batch_windows]).to(student.lm.device)
        with torch.no_grad():
            found = student(
                batch.tokens,
                batch.labels,
                batch.rows,
                documents=batch.documents,
                measuring=True,
                temperature=temperature,
            )
        sums += found.cpu()
    size = sum(label_bytes(tokenizer, window.labels) for window in windows)
    facts = summary(sums.numpy(), exact=exact)
    teacher_nats = teacher_ce(windows)
    student_ce = float(facts["student_ce"] or 0.0)
    positions = sum(int((window.labels != NO_LABEL).sum()) for window in windows)
    return {
        **facts,
        "perplexity": perplexity(student_ce),
        "teacher_ce": teacher_nats,
        "teacher_perplexity": perplexity(teacher_nats),
        "bits_per_byte": student_ce * positions / math.log(2) / size if size else None,
        "teacher_bits_per_byte": teacher_nats * positions / math.log(2) / size if size else None,
        "windows": len(windows),
        "positions": positions,
        "bytes": size,
    }


def label_bytes(tokenizer: Any, labels: NDArray[np.int64]) -> int:
    """UTF-8 bytes of the text of a window's labels [seq_len]; special tokens have none.

    Runs of labels are decoded whole. A character that the window cuts counts as one byte.
    """
    live = np.flatnonzero(labels != NO_LABEL)
    runs = np.split(labels[live], np.flatnonzero(np.diff(live) > 1) + 1)
    texts = [tokenizer.decode(run.tolist(), skip_special_tokens=True) for run in runs if len(run)]
    return sum(len(text.replace("\ufffd", "?").encode()) for text in texts)


def _keep(run: RunRecord, found: Result) -> Result:
    """Join the run's record; tasks of earlier calls stay."""
    before = run.evaluation
    joined = {**before, **found, "tasks": {**before.get("tasks", {}), **found.get("tasks", {})}}
    durable.write_file(run.folder / EVALUATION, durable.to_json(joined))
    say(f"evaluate: kept in {run.folder / EVALUATION}; `ddk-pipe report {run.folder}` shows it")
    return joined


def _show(place: Path, found: Result) -> None:
    record = RunRecord(place, [], [], None, found)
    for table in evaluation_tables([record]):
        show_table(table)


def to_text(found: Result) -> str:
    """As JSON."""
    return json.dumps(found, indent=2, sort_keys=True)
