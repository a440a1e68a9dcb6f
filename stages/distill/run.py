"""The loop of a run: it starts or resumes, takes steps, and ends its intervals, until it is done or told to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.metrics import Record
from ddk_pipe.pipeline.mixing import check_weights
from ddk_pipe.stages.common import StopFlag, StoppedEarly, Tracker, say, stop_flag, track
from ddk_pipe.stages.distill.batches import StepData
from ddk_pipe.stages.distill.ending import finish
from ddk_pipe.stages.distill.identity import Identity
from ddk_pipe.stages.distill.intervals import begin_first, end_interval
from ddk_pipe.stages.distill.journal import Journal
from ddk_pipe.stages.distill.pace import Pace, log_steps
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.trackers import Trackers
from ddk_pipe.stages.distill.windows import steps_of_windows


class Run:
    """One student's training, on this process of its world."""

    def __init__(self, parts: Parts, identity: Identity, is_bad: Callable[[int], bool] | None = None) -> None:
        """`identity` is what must not change before a resume; `is_bad` as `distill` has it."""
        self.parts, self.identity, self.is_bad = parts, identity, is_bad
        self.options, self.world, self.checkpoints = parts.options, parts.world, parts.checkpoints

    def go(self) -> dict[str, Any]:
        """The whole run, from where it stands; returns its summary."""
        project = self.parts.project
        self.checkpoints.sweep()
        position = self._resume()
        record = Record(project.run, last_step=position.step if position else -1, writes=self.world.leads)
        named = self.options.trackers if self.world.leads else []
        with stop_flag() as stop, Trackers.open(named, project, position) as trackers:
            stop.last_words = self._last_words
            journal = Journal(record, trackers, self.checkpoints)
            if position is None:
                position = begin_first(self.parts, journal, self.identity)
            try:
                self._train(position, journal, stop)
            finally:
                journal.close()
            if stop.agreed:
                say(f"distill: stopped at step {position.step}; the same command continues there")
                stop.leave()
        return finish(self.parts, position, self.identity)

    def _last_words(self) -> str:
        """Of a run that could not be saved in time; looks at the disk alone."""
        last = self.checkpoints.last_name()
        where = f"goes on from {last}" if last else "begins anew, for no checkpoint was written yet"
        return f"the same command {where}"

    def _resume(self) -> Position | None:
        found = self.checkpoints.found()
        if not found:
            return None
        position = found[-1].position_as(Position, self._check)
        self.checkpoints.load(found[-1])
        position = position.going_on_to(self.options.steps)
        position.settings = self.identity.settings_digest
        say(f"distill: continuing at step {position.step} of {self.options.steps}")
        return position

    def _check(self, position: Position) -> None:
        """Raises DdkError for another run's, ValueError or TypeError for one that no run of ours has written."""
        known = (self.identity.settings_digest, *self.identity.extends)
        if position.settings not in known or position.made_of != self.identity.made_of_digest:
            raise DdkError(
                f"{self.parts.project.run}: holds a checkpoint of another run (step {position.step})",
                hint="set another distill.name, or delete that folder",
            )
        for weights in (position.weights, position.shares):
            check_weights(np.array(weights), domains=len(self.parts.domains))
        self.parts.sampler.load_state_dict(position.sampler)

    def _train(self, position: Position, journal: Journal, stop: StopFlag) -> None:
        tokens_per_step = self.parts.tokens_per_step
        done, total = position.step * tokens_per_step, self.options.steps * tokens_per_step
        pace = Pace(position.step, log_steps(self.options, self.parts.device))
        with track("distill", total, "tokens", done=done) as advance:
            while position.step < self.options.steps and not position.finished:
                # here, and not where the interval ends: a run killed in between is asked about the same step
                if position.gap is not None and self.is_bad is not None and self.is_bad(position.step):
                    raise StoppedEarly(position.step)
                for data in steps_of_windows(self.parts, position):
                    self._step(position, data)
                    ends = position.step in (self.options.steps, self._end_of(position.step))
                    if not (ends or pace.due(position.step) or self._checkpoint_is_due(position)):
                        continue
                    pace.read(position.step, self._settle(position, journal, advance))
                    if ends:
                        break
                    self._maybe_checkpoint(position, journal, stopping=stop.anywhere(self.world.sum))
                    if stop.agreed:
                        return
                end_interval(self.parts, journal, position)
                if stop.anywhere(self.world.sum):
                    return

    def _step(self, position: Position, data: StepData) -> None:
        self.parts.stepper.step(position.step, data)
        position.step, position.gap = position.step + 1, None

    def _settle(self, position: Position, journal: Journal, advance: Tracker) -> float:
        """Write down the steps since the last time; returns the seconds that one took, the same on every process."""
        tokens, seconds = self.parts.tokens_per_step, 0.0
        for row in self.parts.stepper.settle():
            seconds = row.pop("seconds")
            position.seconds += seconds
            rate = tokens / max(seconds, 1e-9)
            journal.step({**row, "tokens": row["step"] * tokens, "tokens_per_second": rate})
            advance(tokens, f"step {row['step']}  loss {row['loss']:.3f}")
        return float(self.world.sum(np.array([seconds]))[0]) / self.world.size

    def _end_of(self, step: int) -> int:
        """The step that ends the interval to which this step belongs."""
        return -(-step // self.options.interval_steps) * self.options.interval_steps

    def _maybe_checkpoint(self, position: Position, journal: Journal, *, stopping: bool) -> None:
        if stopping or self._checkpoint_is_due(position):
            journal.checkpoint(position)
        else:
            self.checkpoints.poll()

    def _checkpoint_is_due(self, position: Position) -> bool:
        every = self.options.checkpoint_steps
        return every is not None and position.step % every == 0
