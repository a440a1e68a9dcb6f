"""`ddk-pipe distill`: train a student from the cache, mixing domains by the gap to the teacher.

One process, or those of `torchrun --nproc-per-node N --no-python ddk-pipe distill`. The parts are in
the files beside it; this module is the order in which they act. Rerunning the same command continues a run
that was stopped or killed, on the same number of processes to the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ddk_pipe
from ddk_pipe.pipeline import mixing
from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill, Project, windows_per_step
from ddk_pipe.pipeline.metrics import Record
from ddk_pipe.pipeline.mixing import DomainSampler, mixing_rule, rank_slice
from ddk_pipe.pipeline.storage import durable, prefetch
from ddk_pipe.stages.common import (
    StopFlag,
    StoppedEarly,
    peak_memory_bytes,
    pick_device,
    pick_dtype,
    say,
    stop_flag,
    track,
)
from ddk_pipe.stages.distill.checkpoints import Checkpoints
from ddk_pipe.stages.distill.optimizer import make_optimizer
from ddk_pipe.stages.distill.show import lopsided, show_weights
from ddk_pipe.stages.distill.sources import CacheSource, OnlineSource, Source
from ddk_pipe.stages.distill.step import Stepper
from ddk_pipe.stages.distill.students import DistillStudent, build_student, save_student, shared_tokenizer
from ddk_pipe.stages.distill.trackers import Trackers
from ddk_pipe.stages.distill.validation import Outcome, Validation
from ddk_pipe.stages.distill.world import World, join_world, wrap

# what a rule's first update starts from, if not from what the first interval was drawn by
FIRST_WEIGHTS: dict[str, mixing.InitialDraw] = {"ddk": "ddk", "ddk_unsmoothed": "ddk", "natural": "natural"}
# what a run may change between start and resume, because its results do not depend on it
FREE = {
    "name",
    "device",
    "checkpoint_steps",
    "keep_last",
    "keep_best",
    "trackers",
    "parallel",
    "activation_checkpointing",
}


@dataclass
class Position:
    """Where a run stands: enough, with the weights of model and optimizer, to go on as if never stopped."""

    step: int  # optimizer steps done
    seconds: float  # of training so far
    weights: list[float]  # state of the mixing rule, as of the current interval
    shares: list[float]  # what the current interval is drawn by
    sampler: dict[str, Any]  # before the current interval was drawn
    settings: str  # digest of everything that must not change between start and resume
    gap: float | None = None  # mean validation gap, nats per token, where it was measured at this very step
    finished: bool = False  # every gap was below stop_gap_nats
    student_ce: list[float] = field(default_factory=list)  # [domains], nats, at the last weight update
    warnings: list[str] = field(default_factory=list)  # what the user was told once, for the record


@dataclass(frozen=True)
class StepData:
    """What one step trains on."""

    windows: list[CachedWindow]  # this process's
    names: NDArray[np.int64]  # their (domain, window), int64 [windows, 2]
    digest: str  # of the (domain, window) list of all processes: the record shows that the order was the same
    waited_seconds: float


def distill(project: Project, is_bad: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """Train, validate and save one student; returns the run's summary. A finished run is not repeated.

    `is_bad` is asked at each step that ended in a validation and a checkpoint, but for the last: true raises
    StoppedEarly. Run again, the run is asked about that step again and goes on from there.
    """
    with join_world() as world:
        done = project.run / "run.json"
        settings = _settings(project)
        there = done.exists()
        world.wait()  # or a process that comes late would see what the first has finished meanwhile
        if not there:
            return Run(project, settings, world, is_bad).go()
        summary = json.loads(done.read_bytes())
        if summary["settings"] != durable.digest(durable.to_json(settings)):
            raise _other_settings(project)
        say(f"distill: nothing to do, {project.run} is finished")
        return dict(summary)


def _settings(project: Project) -> dict[str, Any]:
    manifest = project.manifest
    student = manifest.student.model_dump() if manifest.student else None
    return {
        "distill": manifest.distill.model_dump(exclude=FREE),
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
    """One student's training, on this process of its world."""

    def __init__(
        self,
        project: Project,
        settings: dict[str, Any],
        world: World | None = None,
        is_bad: Callable[[int], bool] | None = None,
    ) -> None:
        self.project, self.world, self.is_bad = project, world or World(), is_bad
        self.options: Distill = project.manifest.distill
        self.settings = durable.digest(durable.to_json(settings))
        self.domains = list(project.manifest.domains)
        self.device = self.world.device(pick_device(self.options.device))
        if self.options.gradient_skip is not None and self.device.type != "cpu":
            raise DdkError(
                f"distill.gradient_skip: works on a CPU only, and the student is on {self.device}",
                hint="leave it out, or set distill.device: cpu",
            )
        self.windows_per_step = windows_per_step(self.options, project.manifest.seq_len, self.world.size)
        self.source = self._source()
        self.sizes = self.source.sizes
        self.rule = mixing_rule(self.options, self.domains, self.sizes)
        self.tokenizer = shared_tokenizer(project, self.source.tokenizer_digest)
        self.wrapped = wrap(self._student(), self.world, parallel=self.options.parallel, dtype=self._dtype())
        self.student = self.wrapped.student
        self.optimizer = make_optimizer(self.student, self.options)
        self.sampler = DomainSampler(
            self.sizes, seed=self.options.seed, reshuffle=self.options.exhausted == "reshuffle"
        )
        self.validation = Validation(project, self.source, self.wrapped, self._autocast)
        self.teacher_ce = self.validation.teacher_ce
        self.stepper = Stepper(
            self.options, self.source, self.wrapped, self.optimizer, self._autocast, self.domains
        )
        self.checkpoints = Checkpoints(
            project.run / "checkpoints",
            self.wrapped,
            self.optimizer,
            keep_last=self.options.keep_last,
            keep_best=self.options.keep_best,
        )

    def _source(self) -> Source:
        if self.options.targets == "cache":
            return CacheSource(self.project)
        return OnlineSource(self.project, self.device, lead=self.world.leads, wait=self.world.wait)

    def _student(self) -> DistillStudent:
        lm = build_student(self.project, vocab_size=self.source.vocab_size, seed=self.options.seed)
        student = DistillStudent(lm.to(self.device))
        if self.options.activation_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.options.compile:
            for block in student.blocks:  # in place: names stay, and FSDP2 wraps the compiled layers
                block.compile()
        return student

    def go(self) -> dict[str, Any]:
        """The whole run, from where it stands."""
        self.checkpoints.sweep()
        position = self._resume()
        record = Record(
            self.project.run, last_step=position.step if position else -1, writes=self.world.leads
        )
        named = self.options.trackers if self.world.leads else []
        with stop_flag() as stop, Trackers.open(named, self.project, position) as self.trackers:
            if position is None:
                position = self._start(record)
            try:
                self._train(position, record, stop)
            finally:
                self.checkpoints.settle_quietly()
                record.publish()
            if stop.agreed:
                say(f"distill: stopped at step {position.step}; the same command continues there")
                stop.leave()
        return self._finish(position, record)

    def _start(self, record: Record) -> Position:
        """Measure the untrained student and take the first interval's shares from it."""
        outcome = self.validation.run()
        own = FIRST_WEIGHTS.get(self.options.mixing)
        drawn_by = self.options.initial or own or "uniform"
        weights, shares = (
            mixing.initial_weights(
                kind, student_ce=outcome.student_ce, teacher_ce=self.teacher_ce, sizes=self.sizes
            )
            for kind in (own or drawn_by, drawn_by)
        )
        position = Position(
            step=0,
            seconds=0.0,
            weights=weights.tolist(),
            shares=shares.tolist(),
            student_ce=outcome.student_ce.tolist(),
            sampler=self.sampler.state_dict(),
            settings=self.settings,
        )
        self._record_validation(record, position, outcome)
        self._warn_if_lopsided(position, by_gaps=drawn_by == "ddk")
        return position

    def _train(self, position: Position, record: Record, stop: StopFlag) -> None:
        tokens_per_step = self.windows_per_step * self.project.manifest.seq_len
        done, total = position.step * tokens_per_step, self.options.steps * tokens_per_step
        with track("distill", total, "tokens", done=done) as advance:
            while position.step < self.options.steps and not position.finished:
                # here, and not where the interval ends: a run killed in between is asked about the same step
                if position.gap is not None and self.is_bad is not None and self.is_bad(position.step):
                    raise StoppedEarly(position.step)
                for data in self._steps_of_windows(position):
                    row = self._step(position, data)
                    record.add("steps", row)
                    self.trackers.add(position.step, row)
                    advance(tokens_per_step, f"step {position.step}  loss {row['loss']:.3f}")
                    if position.step in (self.options.steps, self._end_of(position.step)):
                        break
                    self._maybe_checkpoint(position, record, stopping=stop.anywhere(self.world.sum))
                    if stop.agreed:
                        return
                self._end_of_interval(position, record)
                if stop.anywhere(self.world.sum):
                    return

    def _steps_of_windows(self, position: Position) -> Iterator[StepData]:
        """What is left of the current interval, step by step; a step's worth of windows is read ahead."""
        into = position.step % self.options.interval_steps
        steps = min(self.options.interval_steps, self.options.steps - position.step + into)
        order = self._interval(position)[into * self.windows_per_step : steps * self.windows_per_step]
        every = np.split(order, steps - into)
        own = [rank_slice(step, rank=self.world.rank, world_size=self.world.size) for step in every]
        each = self.windows_per_step // self.world.size

        def read(row: NDArray[np.int64]) -> CachedWindow:
            return self.source.read(int(row[0]), int(row[1]))

        windows = prefetch(read, np.concatenate(own), ahead=each, threads=self.source.readers)
        for step, mine in zip(every, own, strict=True):
            began = time.monotonic()
            read_ahead = list(islice(windows, each))
            yield StepData(read_ahead, mine, durable.digest(step.tobytes())[:16], time.monotonic() - began)

    def _interval(self, position: Position) -> NDArray[np.int64]:
        """(domain, window) of every window of the current interval, in order, the same on every process."""
        self.sampler.load_state_dict(position.sampler)
        windows = self.options.interval_steps * self.windows_per_step
        return self.sampler.draw_interval(np.array(position.shares), windows)

    def _step(self, position: Position, data: StepData) -> dict[str, Any]:
        """One optimizer step; returns its row of the record."""
        row = self.stepper.step(position.step, data.windows, data.names)
        seconds = row.pop("seconds")
        position.step, position.gap = row["step"], None
        position.seconds += seconds
        tokens = self.windows_per_step * self.project.manifest.seq_len
        return {
            **row,
            "tokens": position.step * tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "data_wait_seconds": data.waited_seconds,
            "data_order": data.digest,
        }

    def _end_of(self, step: int) -> int:
        """The step that ends the interval to which this step belongs."""
        return -(-step // self.options.interval_steps) * self.options.interval_steps

    def _maybe_checkpoint(self, position: Position, record: Record, *, stopping: bool) -> None:
        every = self.options.checkpoint_steps
        if stopping or (every is not None and position.step % every == 0):
            self._checkpoint(position, record)
        else:
            self.checkpoints.poll()

    def _checkpoint(self, position: Position, record: Record) -> None:
        record.sync()  # rows before the checkpoint they belong to
        self.checkpoints.save(asdict(position))

    def _end_of_interval(self, position: Position, record: Record) -> None:
        """Validate, update the weights, checkpoint."""
        outcome = self.validation.run()
        gaps = outcome.student_ce - self.teacher_ce
        before, position.student_ce = np.array(position.student_ce), outcome.student_ce.tolist()
        position.weights = self.rule(
            np.array(position.weights), outcome.student_ce, self.teacher_ce, student_ce_before=before
        ).tolist()
        position.shares, position.gap = position.weights, float(gaps.mean())
        position.sampler = self.sampler.state_dict()
        threshold = self.options.stop_gap_nats
        position.finished = threshold is not None and bool((gaps < threshold).all())
        self._warn_if_lopsided(position, by_gaps=self.options.mixing not in ("uniform", "natural"))
        self._record_validation(record, position, outcome)
        record.publish()
        self._checkpoint(position, record)
        say(
            f"distill: step {position.step}/{self.options.steps}, mean validation gap"
            f" {position.gap:.3f} nats/token"
        )
        show_weights(self.domains, position.shares, gaps.tolist())
        if position.finished:
            say(f"distill: every gap is below {threshold} nats/token, which is what stop_gap_nats asks for")

    def _warn_if_lopsided(self, position: Position, *, by_gaps: bool) -> None:
        """Tell the user, once a run, of an interval that one domain takes nearly whole without their word for it."""
        if position.warnings or not by_gaps or position.step >= self.options.steps:
            return
        text = lopsided(self.options, self.domains, position.shares, step=position.step)
        if text is not None:
            position.warnings.append(text)
            say(f"distill: warning: {text}")

    def _record_validation(self, record: Record, position: Position, outcome: Outcome) -> None:
        drawn = self.sampler.state_dict()["cursors"]
        for index, domain in enumerate(self.domains):
            student, teacher = float(outcome.student_ce[index]), float(self.teacher_ce[index])
            row = {
                "student_ce": student,
                "teacher_ce": teacher,
                "gap": student - teacher,
                "weight": float(position.shares[index]),
                "windows_drawn": drawn[index],
                **{key: value for key, value in outcome.domains[index].items() if key != "student_ce"},
            }
            record.add("validation", {"step": position.step, "domain": domain, **row})
            self.trackers.add(position.step, {f"{domain}/{key}": value for key, value in row.items()})

    def _resume(self) -> Position | None:
        found = self.checkpoints.found()
        if not found:
            return None
        position = Position(**found[-1].position)
        if position.settings != self.settings:
            raise _other_settings(self.project)
        self.checkpoints.load(found[-1])
        say(f"distill: continuing at step {position.step} of {self.options.steps}")
        return position

    def _finish(self, position: Position, record: Record) -> dict[str, Any]:
        self._save_student("student")
        best = self._save_best(position)
        tokens = position.step * self.windows_per_step * self.project.manifest.seq_len
        summary = {
            "settings": self.settings,
            "steps": position.step,
            "tokens": tokens,
            "seconds": position.seconds,
            "tokens_per_second": tokens / max(position.seconds, 1e-9),
            "parameters": sum(parameter.numel() for parameter in self.student.parameters()),
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_device_memory_bytes": self._peak_device_memory(),
            "processes": self.world.size,
            "parallel": self.options.parallel if self.world.distributed else None,
            "stopped_by_gap": position.finished,
            "best_step": best,
            "warnings": position.warnings,
            "cache_fingerprint": self.source.fingerprint,
            "tokenizer_digest": self.source.tokenizer_digest,
            "manifest": self.project.manifest.model_dump(mode="json"),
            "versions": _versions(),
        }
        if self.world.leads:
            durable.write_file(self.project.run / "run.json", durable.to_json(summary))
        self.checkpoints.clear()
        say(f"distill: the student is at {self.project.run / 'student'}")
        return summary

    def _save_student(self, name: str) -> None:
        weights = self.wrapped.weights()
        if self.world.leads:
            save_student(self.student.lm, self.tokenizer, self.project.run / name, weights=weights)

    def _save_best(self, position: Position) -> int | None:
        """Save the best checkpoint's student as best/, if one is kept and it is not the last; returns its step."""
        if not self.options.keep_best:
            return None
        self.world.wait()
        best = self.checkpoints.best(self.checkpoints.found())
        if best is None or best.step == position.step:
            return position.step
        self.checkpoints.load(best)
        self._save_student("best")
        return best.step

    def _dtype(self) -> torch.dtype:
        return pick_dtype(self.options.precision, self.device)

    def _autocast(self) -> Any:
        dtype = self._dtype()
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)

    def _peak_device_memory(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else None


def _versions() -> dict[str, str]:
    import transformers

    return {
        "ddk_pipe": ddk_pipe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
