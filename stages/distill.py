"""`ddk-pipe distill`: train a student from the cache alone, mixing domains by the gap to the teacher."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import ddk_pipe
from ddk_pipe.pipeline import durable, mixing
from ddk_pipe.pipeline.cache import CachedWindow, CacheReader
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, Project
from ddk_pipe.pipeline.metrics import Record
from ddk_pipe.pipeline.models import load_tokenizer
from ddk_pipe.pipeline.prefetch import prefetch
from ddk_pipe.pipeline.sampler import DomainSampler
from ddk_pipe.pipeline.storage import is_url
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets, stack
from ddk_pipe.pipeline.tokens import TRAIN, VALIDATION, tokenizer_digest
from ddk_pipe.stages.progress import say, track
from ddk_pipe.stages.runtime import peak_memory_bytes, pick_device, pick_dtype
from ddk_pipe.stages.students import DistillStudent, build_student, save_student

FIRST_WEIGHTS: dict[str, mixing.InitialDraw] = {"ddk": "ddk", "ddk_unsmoothed": "ddk", "natural": "natural"}
CHECKPOINT = "checkpoints/step-{:08d}"
NEAR_READERS, FAR_READERS = 2, 8  # threads that read windows, from a disk and from an object store


@dataclass(frozen=True)
class Batch:
    """Some windows on the device: tokens, labels int64 [windows, seq_len], targets of all their positions."""

    tokens: Tensor
    labels: Tensor
    targets: SparseTargets

    @classmethod
    def of(cls, windows: list[CachedWindow], device: torch.device) -> Batch:
        return cls(
            torch.from_numpy(np.stack([window.tokens for window in windows])).to(device),
            torch.from_numpy(np.stack([window.labels for window in windows])).to(device),
            stack([window.targets for window in windows]).to(device),
        )


@dataclass
class Position:
    """Where a run stands: enough, with the weights of model and optimizer, to go on as if never stopped."""

    step: int  # optimizer steps done
    seconds: float  # of training so far
    weights: list[float]  # state of the mixing rule, as of the current interval
    shares: list[float]  # what the current interval is drawn by
    sampler: dict[str, Any]  # before the current interval was drawn
    settings: str  # digest of everything that must not change between start and resume


def distill(project: Project) -> dict[str, Any]:
    """Train, validate and save one student; returns the run's summary. A finished run is not repeated."""
    done = project.run / "run.json"
    settings = _settings(project)
    if done.exists():
        summary = json.loads(done.read_bytes())
        if summary["settings"] != durable.digest(durable.to_json(settings)):
            raise _other_settings(project)
        say(f"distill: nothing to do, {project.run} is finished")
        return dict(summary)
    return Run(project, settings).go()


def _settings(project: Project) -> dict[str, Any]:
    manifest = project.manifest
    student = manifest.student.model_dump() if manifest.student else None
    values = manifest.distill.model_dump(exclude={"name", "device"})
    return {
        "distill": values,
        "student": student,
        "domains": sorted(manifest.domains),
        "seq_len": manifest.seq_len,
    }


def _other_settings(project: Project) -> DdkError:
    return DdkError(
        f"{project.run}: holds a run with other settings",
        hint="set another distill.name, or delete that folder",
    )


class Run:
    """One student's training."""

    def __init__(self, project: Project, settings: dict[str, Any]) -> None:
        self.project = project
        self.options: Distill = project.manifest.distill
        self.settings = durable.digest(durable.to_json(settings))
        self.domains = list(project.manifest.domains)
        self.reader = CacheReader(project.cache, self.options.temperature)
        self._check_cache()
        self.sizes = [self.reader.size(domain, TRAIN).windows for domain in self.domains]
        self.rule = mixing.make_rule(self.options.mixing, alpha=self.options.alpha, sizes=self.sizes)
        self.tokenizer = self._tokenizer()
        self.device = torch.device(pick_device(self.options.device))
        if self.options.gradient_skip is not None and self.device.type != "cpu":
            raise DdkError(
                f"distill.gradient_skip: works on a CPU only, and the student is on {self.device}",
                hint="leave it out, or set distill.device: cpu",
            )
        lm = build_student(project, vocab_size=self.reader.spec.vocab_size, seed=self.options.seed)
        self.student = DistillStudent(lm.to(self.device))
        self.optimizer = make_optimizer(self.student, self.options, self.device)
        self.sampler = DomainSampler(self.sizes, seed=self.options.seed)
        self.validation = [self._validation(domain) for domain in self.domains]
        self.teacher_ce = np.array([teacher_ce(windows) for windows in self.validation])
        self.windows_per_step = max(1, round(self.options.batch_tokens / project.manifest.seq_len))

    def _check_cache(self) -> None:
        plan = self.reader.spec.plan
        if self.options.direction == "reverse" and not plan.has_tail:
            raise DdkError(
                f"distill.direction: reverse KL needs a tail bucket, and the cache holds {plan.scheme}",
                hint="cache with scheme: threshold or topk, or use direction: forward",
            )
        if self.reader.spec.seq_len != self.project.manifest.seq_len:
            raise DdkError(
                f"seq_len {self.project.manifest.seq_len}, the cache at {self.project.cache} has"
                f" {self.reader.spec.seq_len}",
                hint="use the cache's seq_len, or set cache.path to a new folder",
            )
        self.reader.require_complete(self.domains)

    def _tokenizer(self) -> Any:
        """The cache's tokenizer, which the student is saved with; a student's own must mean the same by its ids."""
        project = self.project
        student = project.manifest.student
        names = [("tokenizer", project.tokenizer)]
        if student is not None and student.model is not None:
            names.append(("student.model", project.model(student.model, field="student.model")))
        trust = project.manifest.teacher.trust_remote_code
        loaded = [load_tokenizer(name, field=field, trust_remote_code=trust) for field, name in names]
        for (field, name), tokenizer in zip(names, loaded, strict=True):
            if tokenizer_digest(tokenizer) != self.reader.spec.tokenizer_digest:
                raise DdkError(
                    f"{field}: the tokenizer of {name} is not the one the cache at {project.cache} was made with",
                    hint="use a student with the teacher's tokenizer, or make another cache",
                )
        return loaded[0]

    def _validation(self, domain: str) -> list[CachedWindow]:
        size = self.reader.size(domain, VALIDATION)
        wanted = range(min(size.windows, self.options.validation_windows))
        return [self.reader.read(domain, VALIDATION, window) for window in wanted]

    def go(self) -> dict[str, Any]:
        position = self._resume()
        record = Record(self.project.run, last_step=position.step if position else -1)
        if position is None:
            position = self._start(record)
        try:
            self._train(position, record)
        except KeyboardInterrupt:
            self._save(position)
            record.publish()
            say(f"distill: stopped at step {position.step}; the same command continues there")
            raise
        return self._finish(position, record)

    def _start(self, record: Record) -> Position:
        """Measure the untrained student and take the first interval's shares from it."""
        student_ce = self._validate()
        own = FIRST_WEIGHTS.get(self.options.mixing, "uniform")  # what the rule's first update starts from
        weights, shares = (
            mixing.initial_weights(kind, student_ce=student_ce, teacher_ce=self.teacher_ce, sizes=self.sizes)
            for kind in (own, self.options.initial or own)
        )
        self._record_validation(record, 0, student_ce, shares.tolist())
        return Position(
            step=0,
            seconds=0.0,
            weights=weights.tolist(),
            shares=shares.tolist(),
            sampler=self.sampler.state_dict(),
            settings=self.settings,
        )

    def _train(self, position: Position, record: Record) -> None:
        tokens_per_step = self.windows_per_step * self.project.manifest.seq_len
        done, total = position.step * tokens_per_step, self.options.steps * tokens_per_step
        with track("distill", total, "tokens", done=done) as advance:
            while position.step < self.options.steps:
                into = position.step % self.options.interval_steps
                steps = min(self.options.interval_steps, self.options.steps - position.step + into)
                order = self._interval(position)
                first, last = into * self.windows_per_step, steps * self.windows_per_step
                for waited, windows in self._steps_of_windows(order[first:last]):
                    row = {**self._step(position, windows), "data_wait_seconds": waited}
                    record.add("steps", row)
                    advance(tokens_per_step, f"step {position.step}  loss {row['loss']:.3f}")
                self._end_of_interval(position, record)

    def _interval(self, position: Position) -> NDArray[np.int64]:
        """(domain, window) of every window of the current interval, in order."""
        self.sampler.load_state_dict(position.sampler)
        windows = self.options.interval_steps * self.windows_per_step
        return self.sampler.draw_interval(np.array(position.shares), windows)

    def _steps_of_windows(self, order: NDArray[np.int64]) -> Iterator[tuple[float, list[CachedWindow]]]:
        """The windows of each step, a step's worth of them read ahead, and the seconds they were waited for."""

        def read(row: NDArray[np.int64]) -> CachedWindow:
            return self.reader.read(self.domains[row[0]], TRAIN, int(row[1]))

        readers = FAR_READERS if is_url(self.reader.folder.name) else NEAR_READERS
        windows = prefetch(read, order, ahead=self.windows_per_step, threads=readers)
        for _ in range(0, len(order), self.windows_per_step):
            began = time.monotonic()
            step = list(islice(windows, self.windows_per_step))
            yield time.monotonic() - began, step

    def _step(self, position: Position, windows: list[CachedWindow]) -> dict[str, Any]:
        """One optimizer step; returns its row of the record."""
        began = time.monotonic()
        self.student.train()
        rate = learning_rate(self.options, position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels = sum(int((window.labels != NO_LABEL).sum()) for window in windows)
        sums = np.zeros(3)
        # of gradient_skip: a pure function of seed and step, so that a resumed run draws the same
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + position.step)
        for start in range(0, len(windows), self.options.micro_batch_windows):
            batch = Batch.of(windows[start : start + self.options.micro_batch_windows], self.device)
            loss = self._loss(batch, generator)
            (loss.total / max(labels, 1)).backward()
            sums += [
                float(loss.total.detach()),
                float(loss.ce),
                float(loss.kl) + target_entropy(batch.targets),
            ]
        total, ce, target_ce = sums / max(labels, 1)
        norm = self._clip()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise DdkError(
                f"distill: the loss is {total} (gradient norm {norm}) at step {position.step}",
                hint="lower distill.optimizer.learning_rate; the last checkpoint is kept",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        position.step += 1
        seconds = time.monotonic() - began
        position.seconds += seconds
        tokens = len(windows) * self.project.manifest.seq_len
        return {
            "step": position.step,
            "tokens": position.step * tokens,
            "loss": total,
            "ce": ce,
            "target_ce": target_ce,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }

    def _loss(self, batch: Batch, generator: torch.Generator) -> Any:
        options = self.options
        squared = 1.0 if options.temperature_squared else options.temperature**-2
        with self._autocast():
            return self.student(
                batch.tokens,
                batch.labels,
                batch.targets,
                gamma=options.gamma * squared,
                temperature=options.temperature,
                direction=options.direction,
                gradient_skip=options.gradient_skip,
                generator=generator,
            )

    def _autocast(self) -> Any:
        dtype = pick_dtype(self.options.precision, self.device)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)

    def _clip(self) -> float:
        limit = self.options.optimizer.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit or math.inf)
        return float(norm)

    def _end_of_interval(self, position: Position, record: Record) -> None:
        """Validate, update the weights, checkpoint."""
        student_ce = self._validate()
        position.weights = self.rule(np.array(position.weights), student_ce, self.teacher_ce).tolist()
        position.shares = position.weights
        position.sampler = self.sampler.state_dict()
        self._record_validation(record, position.step, student_ce, position.shares)
        record.publish()
        self._save(position)
        gap = float((student_ce - self.teacher_ce).mean())
        say(f"distill: step {position.step}/{self.options.steps}, mean validation gap {gap:.3f} nats/token")

    @torch.no_grad()
    def _validate(self) -> NDArray[np.float64]:
        """Student CE per domain on its validation windows, nats per token."""
        self.student.eval()
        out = []
        for windows in self.validation:
            ce = labels = 0.0
            for start in range(0, len(windows), self.options.micro_batch_windows):
                batch = Batch.of(windows[start : start + self.options.micro_batch_windows], self.device)
                with self._autocast():
                    loss = self.student(batch.tokens, batch.labels, None, gamma=0.0)
                ce, labels = ce + float(loss.ce), labels + loss.positions
            out.append(ce / max(labels, 1))
        return np.array(out)

    def _record_validation(
        self, record: Record, step: int, student_ce: NDArray[np.float64], shares: list[float]
    ) -> None:
        for index, domain in enumerate(self.domains):
            student, teacher = float(student_ce[index]), float(self.teacher_ce[index])
            record.add(
                "validation",
                {
                    "step": step,
                    "domain": domain,
                    "student_ce": student,
                    "teacher_ce": teacher,
                    "gap": student - teacher,
                    "weight": float(shares[index]),
                },
            )

    def _save(self, position: Position) -> None:
        """Checkpoint; the one before is removed once this one is whole."""
        final = self.project.run / CHECKPOINT.format(position.step)
        if final.exists():
            return
        durable.make_folder(final.parent)
        partial = durable.partial_name(final)
        try:
            partial.mkdir()
            weights = {name: value.detach().contiguous() for name, value in self.student.named_parameters()}
            save_file(weights, partial / "model.safetensors")
            torch.save(self.optimizer.state_dict(), partial / "optimizer.pt")
            (partial / "position.json").write_bytes(durable.to_json(vars(position)))
            durable.publish_folder(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for older in final.parent.glob("step-*"):
            if older != final:
                shutil.rmtree(older, ignore_errors=True)

    def _resume(self) -> Position | None:
        found = sorted((self.project.run / "checkpoints").glob("step-*"))
        if not found:
            return None
        position = Position(**json.loads((found[-1] / "position.json").read_bytes()))
        if position.settings != self.settings:
            raise _other_settings(self.project)
        weights = load_file(found[-1] / "model.safetensors")
        with torch.no_grad():
            for name, value in self.student.named_parameters():
                value.copy_(weights[name])
        state = torch.load(found[-1] / "optimizer.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)
        say(f"distill: continuing at step {position.step} of {self.options.steps}")
        return position

    def _finish(self, position: Position, record: Record) -> dict[str, Any]:
        record.publish()
        save_student(self.student.lm, self.tokenizer, self.project.run / "student")
        tokens = self.options.steps * self.windows_per_step * self.project.manifest.seq_len
        summary = {
            "settings": self.settings,
            "steps": position.step,
            "tokens": tokens,
            "seconds": position.seconds,
            "tokens_per_second": tokens / max(position.seconds, 1e-9),
            "parameters": sum(parameter.numel() for parameter in self.student.parameters()),
            "peak_memory_bytes": peak_memory_bytes(),
            "cache_fingerprint": self.reader.spec.fingerprint,
            "manifest": self.project.manifest.model_dump(mode="json"),
            "versions": {"ddk_pipe": ddk_pipe.__version__, "torch": torch.__version__},
        }
        durable.write_file(self.project.run / "run.json", durable.to_json(summary))
        shutil.rmtree(self.project.run / "checkpoints", ignore_errors=True)
        say(f"distill: the student is at {self.project.run / 'student'}")
        return summary


def make_optimizer(student: torch.nn.Module, options: Distill, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [parameter for parameter in student.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in student.parameters() if parameter.ndim < 2]
    chosen = options.optimizer
    groups = [
        {"params": matrices, "weight_decay": chosen.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=chosen.learning_rate, betas=chosen.betas, fused=True)


def learning_rate(options: Distill, step: int) -> float:
    """Rate of the step after `step` done ones: linear warm-up, then cosine to final_ratio, or constant."""
    peak, schedule = options.optimizer.learning_rate, options.schedule
    warmup = round(schedule.warmup_fraction * options.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    progress = (step - warmup) / max(1, options.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * cosine)


def teacher_ce(windows: list[CachedWindow]) -> float:
    """The teacher's CE on these windows, nats per token: the mean of the cached label log-probabilities."""
    labelled = np.concatenate([window.label_logprobs[window.labels != NO_LABEL] for window in windows])
    return float(-labelled.astype(np.float64).mean())


def target_entropy(targets: SparseTargets) -> float:
    """Sum over positions of -sum w log w, nats. KL plus this is the cross-entropy to the targets, which under a
    sampled scheme is what has a meaning: the KL's value contains the entropy of the draws."""
    entropy = torch.special.entr(targets.logprobs.double().exp()).sum()
    return float(entropy + torch.special.entr(targets.tail.double().exp()).sum())


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run; raises DdkError if there is none."""
    path = folder / "run.json"
    if not path.exists():
        raise DdkError(f"{folder}: no finished run", hint="run `ddk-pipe distill`")
    return dict(json.loads(path.read_bytes()))
