"""Checkpoints: whole or not there, written by any number of processes, read by any other number.

    checkpoints/step-00000050/
        position.json        where the run stands (written last, before the folder gets its name)
        *.safetensors        parameters and AdamW's moments, tensors only (see tensor_files)

Several processes write in the background while training goes on; the folder is renamed when all are done. Learning
rates, gamma and the data order are functions of the position, so nothing else is kept. Reading runs no code of the
checkpoint's: nothing is unpickled, neither here nor by torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ddk_pipe.pipeline.errors import DdkError, first_mistake
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.distill.tensor_files import TensorReader, tensor_writer
from ddk_pipe.stages.distill.world import Wrapped

T = TypeVar("T")
NAME = "step-{:08d}"
PICKLED = ".metadata"  # in checkpoints of versions before this one
POSITION_BYTES = 1 << 24
FULL_BYTES = 1 << 20  # a write that failed for want of space has taken all but this


@dataclass(frozen=True)
class Found:
    """A checkpoint on the disk."""

    folder: Path
    position: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.position["step"])

    def position_as(self, kind: type[T], check: Callable[[T], object]) -> T:
        """Its position as this dataclass; raises DdkError for other types, and where `check` raises ValueError."""
        try:
            position = TypeAdapter(kind).validate_json(json.dumps(self.position), strict=True)
            check(position)
        except ValidationError as problem:
            raise _damaged(self.folder, ValueError(f"position.json: {first_mistake(problem)}")) from None
        except (ValueError, TypeError) as problem:
            raise _damaged(self.folder, problem) from None
        return position


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
        self._pending: tuple[Future[Any], Path, dict[str, Any]] | None = None

    def save(self, position: dict[str, Any]) -> None:
        """Begin a checkpoint of this position; alone it is whole on return, else after `settle` or some `poll`."""
        self.settle()
        final = self.folder / NAME.format(position["step"])
        if final.exists():
            return
        partial = final.with_name(f".{final.name}.partial")
        if self.world.leads:
            durable.make_folder(self.folder)
            shutil.rmtree(partial, ignore_errors=True)
        self.world.wait()
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        writer = tensor_writer(partial, tensors)
        if not self.world.distributed:
            try:
                with _no_word_of_one_process():
                    save(tensors, storage_writer=writer, no_dist=True)
                self._publish(partial, position)
            except (Exception, CheckpointException) as problem:  # noqa: BLE001 - torch hides the system's errors
                raise self._not_written(final, problem) from None
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return
        try:
            future = async_save(tensors, storage_writer=writer, process_group=self.world.saving)
        except (Exception, CheckpointException) as problem:  # noqa: BLE001 - as above
            raise self._not_written(final, problem) from None
        assert isinstance(future, Future)
        self._pending = future, partial, position

    def poll(self) -> None:
        """Give a checkpoint its name if it was written meanwhile. Waits for nothing."""
        if self._pending and self._pending[0].done():
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint under way, and give it its name."""
        if self._pending is None:
            return
        (future, partial, position), self._pending = self._pending, None
        final = self.folder / NAME.format(position["step"])
        try:
            future.result()
            # the first process is done only once all others are: it writes the metadata of all their files
            if self.world.leads:
                self._publish(partial, position)
        except (Exception, CheckpointException) as problem:  # noqa: BLE001 - torch hides the system's errors
            raise self._not_written(final, problem) from None
        finally:
            if self.world.leads:
                shutil.rmtree(partial, ignore_errors=True)

    def settle_quietly(self) -> None:
        """`settle` on the way out of a run, also of a failed one, whose own error is what counts."""
        if sys.exc_info()[0] is None:
            self.settle()
            return
        with contextlib.suppress(Exception):
            self.settle()

    def _not_written(self, final: Path, problem: BaseException) -> DdkError:
        """The user's view of it: a full disk in the system's words, or else torch's, with the room that is left."""
        cause, told = _cause(problem), None
        if isinstance(cause, DdkError):
            return cause
        free = durable.free_bytes(self.folder)
        if isinstance(cause, RuntimeError) and free < FULL_BYTES:  # "unexpected pos" of torch's own writer
            cause = OSError(errno.ENOSPC, "No space left on device")
        if isinstance(cause, OSError):
            cause.filename = str(final)
            told = durable.explain(cause)
        return told or DdkError(
            f"{final}: the checkpoint cannot be written ({_last_line(cause)}; {free / 1e6:,.1f} MB free there)",
            hint="free some space or mend the disk, and run the same command again; earlier checkpoints are kept",
        )

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
                out.append(Found(folder, _read_position(folder)))
            except (OSError, ValueError, RecursionError) as problem:
                raise _damaged(folder, problem) from None
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
            raise _damaged(found.folder, _cause(problem)) from None

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


def _read_position(folder: Path) -> dict[str, Any]:
    """The content of position.json; raises OSError or ValueError."""
    path = folder / "position.json"
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise ValueError("position.json is not an ordinary file of this folder")
    if path.stat().st_size > POSITION_BYTES:
        raise ValueError(f"position.json has more than {POSITION_BYTES:,} bytes")
    position = json.loads(path.read_bytes())
    if not isinstance(position, dict) or type(position.get("step")) is not int:
        raise ValueError("position.json holds no step")
    if folder.name != NAME.format(position["step"]):
        raise ValueError(f"position.json is of step {position['step']}")
    return position


def remove_checkpoint(folder: Path) -> None:
    """A folder that goes has lost its name first: a kill leaves no half of one behind."""
    going = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _cause(problem: BaseException) -> BaseException:
    """What went wrong on the first rank that failed: DCP's own exception is no Exception, and wraps it."""
    if isinstance(problem, CheckpointException):
        for wrapped, _ in problem.failures.values():
            return wrapped
    return problem


def _damaged(folder: Path, problem: BaseException) -> DdkError:
    return DdkError(
        f"{folder}: the checkpoint cannot be read ({_last_line(problem)})",
        hint="delete that folder to go on from the checkpoint before it, or from the start",
    )


def _last_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[-1][:200] if lines else type(problem).__name__


@contextlib.contextmanager
def _no_word_of_one_process() -> Iterator[None]:
    """DCP warns where no process group is; that is what we ask for with no_dist."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield
