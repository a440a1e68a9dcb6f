"""Is a cache of pps draws as good as the teacher itself? The same student, windows, steps and seeds, five targets.

    online        the teacher's whole distribution at every step (distill.targets: online)
    pps           the cache's default, tau 0.02
    topk_renorm   the k largest scaled up to sum 1, what "top-k distillation" often means: biased
    topk_bucket   the k largest and one bucket for the rest
    ce            no teacher (gamma 0)

SmolLM2-135M teaches a student of some of its layers on text of installed packages. gamma is 4, so that the targets
make four fifths of the loss and their differences can be seen. What counts is the student's validation loss after
the last step: CE, and KL to the teacher's whole distribution beside it, nats per token, means over the domains'
validation windows, which are the same for all. Goals, on CE: pps within 0.5% of online on average over the seeds, and
topk_renorm visibly worse than that: beyond the 0.5%. Standard errors are over seeds (order of the windows), of
differences seed by seed; the windows validated on and the cache's draws are the same for all seeds.

    PYTHONPATH=benchmarks python benchmarks/offline_online.py [--teacher FOLDER] [--seeds 3] [--json OUT]

Losses, no times: the teacher's last hidden states of a window are kept once they are known, and the output layer
makes the whole distribution of them at every step. The file is written anew after every seed, the first three
variants first.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Row, goal, report, teacher_option
from torch import Tensor

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.losses import DenseTargets, linear_dense_kd
from ddk_pipe.pipeline.manifest import Project, load_project
from ddk_pipe.stages.common import prepare_cpu
from ddk_pipe.stages.distill import Batch
from ddk_pipe.stages.distill.identity import asked_for, begin
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.run import Run
from ddk_pipe.stages.distill.sources import CacheSource, OnlineSource, Source
from ddk_pipe.stages.prepare import prepare
from ddk_pipe.stages.teachers.hf import HfTeacher

DOMAINS = ("python_code", "documentation", "plays")
SEQ_LEN, BATCH_WINDOWS = 256, 2
TRAIN_WINDOWS, VALIDATION_WINDOWS = 40, 8  # of a domain; 60 steps are one epoch
KEEP_LAYERS = [0, 1, 2, 3, 27, 28, 29]  # of 30
GAMMA, LEARNING_RATE, TOP_K = 4.0, 6e-4, 5
WITHIN = 0.005  # of online's validation loss
SETS: dict[str, list[str]] = {
    "online": ["distill.targets=online"],
    "pps": [],
    "topk_renorm": ["cache.scheme=topk", f"cache.k={TOP_K}", "cache.path=topk", "distill.tail=renormalise"],
    "topk_bucket": ["cache.scheme=topk", f"cache.k={TOP_K}", "cache.path=topk"],
    "ce": ["distill.gamma=0"],
}
GOALS_NEED, BESIDE = ("online", "pps", "topk_renorm"), ("topk_bucket", "ce")


class Known:
    """The teacher's last hidden states, float32 [seq_len, d] of every window it was asked about."""

    def __init__(self, teacher: HfTeacher) -> None:
        self.teacher = teacher
        self._states: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def targets(self, windows: Tensor) -> DenseTargets:
        """Its whole distribution at every position of these windows, int64 [windows, seq_len]."""
        known = []
        for tokens in windows:
            key = tokens.numpy().tobytes()
            if key not in self._states:
                self._states[key] = self.teacher.head.states(tokens[None].long())[0]
            known.append(self._states[key])
        return DenseTargets(torch.cat(known), self.teacher.head.logits, self.teacher.vocab_size)


class KnownOnline(OnlineSource):
    """distill.targets: online, but for a teacher that is not asked twice about a window."""

    known: Known | None = None

    def complete(self, batch: Batch) -> Batch:
        if KnownOnline.known is None:
            KnownOnline.known = Known(self.teacher)
        return replace(batch, dense=KnownOnline.known.targets(batch.tokens))


class OnlineParts(Parts):
    def _source(self) -> Source:
        return KnownOnline(self.project, self.device)


KINDS: dict[str, type[Parts]] = {"online": OnlineParts}


class Judge:
    """Measures students on the validation windows, against the teacher's whole distribution."""

    def __init__(self, project: Project) -> None:
        source = CacheSource(project)
        counts = [min(size, VALIDATION_WINDOWS) for size in source.validation_sizes]
        self.windows = [
            [source.validation(index, window) for window in range(count)]
            for index, count in enumerate(counts)
        ]
        teacher = HfTeacher(
            Path(project.teacher_model), project.manifest.teacher, vocab_size=source.vocab_size
        )
        self.known = Known(teacher)

    @torch.no_grad()
    def losses(self, lm: Any) -> tuple[float, float]:
        """CE and KL(teacher || student), nats per token, means over the domains."""
        lm.eval()
        found = [self._domain(lm, windows) for windows in self.windows]
        ce, kl = zip(*found, strict=True)
        return statistics.fmean(ce), statistics.fmean(kl)

    def _domain(self, lm: Any, windows: list[CachedWindow]) -> tuple[float, float]:
        ce, kl, positions = 0.0, 0.0, 0
        for window in windows:
            tokens, labels = torch.from_numpy(window.tokens)[None], torch.from_numpy(window.labels)
            hidden = lm.base_model(input_ids=tokens.long(), use_cache=False).last_hidden_state
            loss = linear_dense_kd(
                hidden[0],
                lm.get_output_embeddings().weight,
                labels,
                self.known.targets(tokens),
                gamma=GAMMA,
            )
            ce, kl, positions = ce + float(loss.ce), kl + float(loss.kl), positions + loss.positions
        return ce / positions, kl / positions


def make_project(folder: Path, teacher: Path, steps: int) -> Path:
    """The manifest and its two caches."""
    from ddk_pipe.stages.cache_teacher import cache_teacher
    from ddk_pipe.stages.demo.material import write_texts

    write_texts(folder / "text")
    manifest = {
        "output": "out",
        "domains": {name: {"train": f"text/{name}.jsonl"} for name in DOMAINS},
        "teacher": {"model": str(teacher), "backend": "hf"},
        "seq_len": SEQ_LEN,
        "attention": "window",  # as what it is measured against
        "prepare": {
            "max_train_windows": TRAIN_WINDOWS,
            "max_validation_windows": VALIDATION_WINDOWS,
            "validation_fraction": 0.2,
        },
        "student": {"keep_layers": KEEP_LAYERS},
        "distill": {
            "steps": steps,
            "interval_steps": steps,
            "batch_tokens": SEQ_LEN * BATCH_WINDOWS,
            "micro_batch_windows": BATCH_WINDOWS,
            "validation_windows": 1,  # the loop's own; the judge has them all
            "gamma": GAMMA,
            "mixing": "uniform",
            "optimizer": {"learning_rate": LEARNING_RATE},
        },
    }
    path = folder / "manifest.yaml"
    path.write_text(json.dumps(manifest))
    for name in ("pps", "topk_bucket"):
        cache_teacher(load_project(path, SETS[name]))
    return path


def final_losses(manifest: Path, judge: Judge, variant: str, seed: int) -> tuple[float, float]:
    """Validation CE and KL after the last step of one run."""
    sets = [*SETS[variant], f"distill.seed={seed}", f"distill.name={variant}-{seed}"]
    project = load_project(manifest, sets)
    if project.manifest.distill.targets == "online":
        prepare(project)
    parts = KINDS.get(variant, Parts)(project)
    Run(parts, begin(project, asked_for(project))).go()
    shutil.rmtree(project.run)
    return judge.losses(parts.student.lm)


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean over the seeds and its standard error."""
    if len(values) < 2:
        return statistics.fmean(values), None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def summarise(losses: dict[str, list[tuple[float, float]]]) -> tuple[list[Row], list[Row]]:
    """Rows and goals of what has been measured so far."""
    rows: list[Row] = []
    above: dict[str, tuple[float, float | None]] = {}
    for name, pairs in losses.items():
        if not pairs:
            continue
        ce, kl = (list(column) for column in zip(*pairs, strict=True))
        relative = [mine / base - 1 for mine, (base, _) in zip(ce, losses["online"], strict=False)]
        above[name] = mean_and_error(relative)
        row: Row = {"targets": name, "seeds": len(pairs)}
        for key, values in (
            ("validation_ce_nats", ce),
            ("validation_kl_nats", kl),
            ("ce_above_online", relative),
        ):
            row[key], row[f"{key}_standard_error"] = mean_and_error(values)
            row[f"{key}_by_seed"] = values
        rows.append(row)
    if not all(name in above for name in GOALS_NEED):
        return rows, []
    off, bad = above["pps"][0], above["topk_renorm"][0]
    goals = [
        goal("pps validation loss against online", "within 0.5%", off, abs(off) <= WITHIN),
        goal("topk_renorm above online", "> 0.5%: the difference can be seen", bad, bad > WITHIN),
    ]
    return rows, goals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    teacher_option(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepare_cpu()
    folder = Path(tempfile.mkdtemp(prefix="offline-online-"))
    settings = {
        "steps": args.steps,
        "tokens_per_step": SEQ_LEN * BATCH_WINDOWS,
        "seq_len": SEQ_LEN,
        "attention": "window",  # as what it is measured against
        "gamma": GAMMA,
        "learning_rate": LEARNING_RATE,
        "top_k": TOP_K,
        "keep_layers": KEEP_LAYERS,
        "validation_windows_per_domain": VALIDATION_WINDOWS,
    }
    command = " ".join(["python", "benchmarks/offline_online.py", *sys.argv[1:]])
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in SETS}
    try:
        from ddk_pipe.stages.demo.material import write_teacher

        write_teacher(args.teacher)
        manifest = make_project(folder, args.teacher.resolve(), args.steps)
        judge = Judge(load_project(manifest))
        for names in (GOALS_NEED, BESIDE):
            for seed in range(args.seeds):
                for name in names:
                    losses[name].append(final_losses(manifest, judge, name, seed))
                    print(time.strftime("%H:%M:%S"), name, seed, losses[name][-1], flush=True)
                report(*summarise(losses), args.json, command=command, **settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
