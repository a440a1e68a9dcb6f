"""The checkpoints of one run: begun in a step, named when their files are there, kept or removed, and loaded."""

from __future__ import annotations

import contextlib
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.distill.checkpoints.failures import cause, damaged, not_written
from ddk_pipe.stages.distill.checkpoints.finding import NAME, Found, read_position, remove_checkpoint
from ddk_pipe.stages.distill.checkpoints.tensor_files import TensorReader
from ddk_pipe.stages.distill.checkpoints.writing import begin_shards, begin_whole
from ddk_pipe.stages.distill.world import Wrapped

PICKLED = ".metadata"  # in checkpoints of versions before this one


@dataclass(frozen=True)
class _Pending:
    """A checkpoint under way, on every process; `written` is of the files that this one writes or waits for."""

    written: Future[Any]
    partial: Path
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Every process of the world makes every call, in the same order."""

    def __init__(
        self,
        folder: Path,
        wrapped: Wrapped,
        optimizer: torch.optim.Optimizer,
        *,
        keep_last: int,
        keep_best: bool,
        stable_steps: int = 0,
    ) -> None:
        """`stable_steps`: up to there a longer run would take the same steps (`schedules.stable_steps`)."""
        self.folder, self.wrapped, self.optimizer = folder, wrapped, optimizer
        self.world = wrapped.world
        self.keep_last, self.keep_best = keep_last, keep_best
        self.stable_steps = stable_steps
        self._pending: _Pending | None = None

    def save(self, position: dict[str, Any]) -> None:
        """Begin a checkpoint of this position: it is whole after `settle` or some `poll`, which raise DdkError if not."""
        self.settle()
        final = self.folder / NAME.format(position["step"])
        if final.exists():
            return
        partial = final.with_name(f".{final.name}.partial")
        try:
            begin = begin_shards if self.wrapped.sharded else begin_whole
            written = begin(partial, self._tensors(), self.world)
        except (Exception, CheckpointException) as problem:  # noqa: BLE001 - torch hides the system's errors
            raise not_written(final, problem) from None
        self._pending = _Pending(written, partial, position)

    def poll(self) -> None:
        """`settle`, if the checkpoint under way was written meanwhile. Waits for no disk."""
        if self._pending is None:
            return
        writing = np.array([float(not self._pending.written.done())])
        if not self.world.sum(writing).any():
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint under way, and give it its name; raises DdkError on every process if it is not whole."""
        if self.wrapped.sharded:
            self._finish()
        elif self._pending is not None:
            self.world.of_leader(self._finish)
            self._pending = None

    def settle_quietly(self) -> None:
        """`settle` on the way out of a run, also of a failed one, whose own error is what counts."""
        if sys.exc_info()[0] is None:
            self.settle()
            return
        with contextlib.suppress(Exception):
            self._finish()  # without the others: they may be elsewhere

    def _finish(self) -> None:
        """This process's part of `settle`."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        final = self.folder / NAME.format(pending.position["step"])
        try:
            pending.written.result()
            # of shards the first process is done only once all others are: it writes the metadata of all their files
            if self.world.leads:
                self._publish(pending.partial, pending.position)
        except (Exception, CheckpointException) as problem:  # noqa: BLE001 - torch hides the system's errors
            raise not_written(final, problem) from None
        finally:
            if self.world.leads:
                shutil.rmtree(pending.partial, ignore_errors=True)

    def _publish(self, partial: Path, position: dict[str, Any]) -> None:
        (partial / "position.json").write_bytes(durable.to_json(position))
        durable.publish_folder(partial, self.folder / NAME.format(position["step"]))
        self._prune()

    def _prune(self) -> None:
        found = self.found()
        kept = {one.folder for one in found[-self.keep_last :]}
        best = self.best(found)
        if self.keep_best and best:
            kept.add(best.folder)
        kept |= {one.folder for one in self._extensible(found)}
        for one in found:
            if one.folder not in kept:
                remove_checkpoint(one.folder)

    def found(self) -> list[Found]:
        """Whole checkpoints, oldest first. Raises DdkError for one that cannot be read."""
        self._refuse_link()
        out = []
        for folder in sorted(self.folder.glob("step-*")):
            try:
                out.append(Found(folder, read_position(folder)))
            except (OSError, ValueError, RecursionError) as problem:
                raise damaged(folder, problem) from None
        return out

    def last_name(self) -> Path | None:
        """Where the newest one is, unread; None if there is none."""
        return max(self.folder.glob("step-*"), default=None)

    def _refuse_link(self) -> None:
        """What is in this folder is removed without asking, so it is the run's own."""
        if self.folder.is_symlink():
            raise DdkError(
                f"{self.folder}: a link, and checkpoints are not written or removed outside of the run's folder",
                hint="delete the link, and set output to where there is room",
            )

    def best(self, found: list[Found]) -> Found | None:
        """The checkpoint of the lowest mean validation gap, of those that were validated."""
        validated = [one for one in found if one.position.get("gap") is not None]
        return min(validated, key=lambda one: float(one.position["gap"]), default=None)

    def load(self, found: Found) -> None:
        """Copy its tensors into the student and the optimizer; raises DdkError if they do not fit or are damaged."""
        if (found.folder / PICKLED).exists():
            raise DdkError(
                f"{found.folder}: the checkpoint is of an older ddk-pipe, in pickles, which are not read",
                hint="finish the run with that version, or delete its folder checkpoints to start again",
            )
        tensors = self._tensors()
        reader = TensorReader(found.folder, tensors)
        try:
            reader.read_metadata()  # DCP would print a traceback before it gives up
            with _no_word_of_one_process():
                load(dict(tensors), storage_reader=reader, no_dist=not self.world.distributed)
        except (Exception, CheckpointException) as problem:  # noqa: BLE001 - whatever damaged bytes lead to
            raise damaged(found.folder, cause(problem)) from None

    def clear(self) -> None:
        """The run is finished: remove them all but the one that a longer run would go on from."""
        self.settle()
        self.world.wait()
        if not self.world.leads:
            return
        found = self.found()
        kept = self._extensible(found)
        for one in found if kept else []:
            if one not in kept and not (self.keep_best and one == self.best(found)):
                remove_checkpoint(one.folder)
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _extensible(self, found: list[Found]) -> list[Found]:
        """The latest of those that a longer run would have come by too; none for schedules that know their end."""
        return [one for one in found if one.step <= self.stable_steps][-1:]

    def sweep(self) -> None:
        """Remove what a killed process left."""
        self._refuse_link()
        if self.world.leads:
            for left in self.folder.glob(".*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        self.world.wait()

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of student and optimizer by name, as they are (shards, where there are shards)."""
        tensors: dict[str, Tensor] = {}
        state = dict(self.optimizer.state)  # no defaultdict: a parameter without its moments must not pass
        for name, parameter in self.wrapped.student.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors


@contextlib.contextmanager
def _no_word_of_one_process() -> Iterator[None]:
    """DCP warns where no process group is; that is what we ask for with no_dist."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield
