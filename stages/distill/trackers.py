"""TensorBoard, Weights & Biases and trackio beside the run's own record. Each is an extra, imported when asked for."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.manifest import Project

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Resumed(Protocol):
    """Where a run continues."""

    step: int


class Trackers:
    """Hands every row to each tracker that the manifest names."""

    def __init__(self, sinks: list[Callable[[int, dict[str, float]], None]]) -> None:
        self._sinks = sinks

    @classmethod
    @contextmanager
    def open(cls, names: list[Any], project: Project, resumed: Resumed | None) -> Iterator[Trackers]:
        """Raises DdkError if a tracker's package is not installed. Closes them at the end."""
        for name in names:
            if importlib.util.find_spec(PACKAGES[name]) is None:
                raise DdkError(f"distill.trackers: {name} is not installed", hint=install_hint(name))
        with ExitStack() as stack:
            opener = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
            yield cls([opener[name](project, resumed, stack) for name in dict.fromkeys(names)])

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of one step; what is no number is left out."""
        numbers = {
            key: float(value)
            for key, value in values.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for sink in self._sinks:
            sink(step, numbers)


def _tensorboard(
    project: Project, resumed: Resumed | None, stack: ExitStack
) -> Callable[[int, dict[str, float]], None]:
    from torch.utils.tensorboard import SummaryWriter

    purge = resumed.step + 1 if resumed else 0  # steps that were logged and then trained again
    writer: Any = SummaryWriter(str(folder_of(project)), purge_step=purge)
    stack.callback(writer.close)

    def sink(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return sink


def folder_of(project: Project) -> Path:
    """Where TensorBoard's files are."""
    return project.run / "tensorboard"


def _wandb(
    project: Project, resumed: Resumed | None, stack: ExitStack
) -> Callable[[int, dict[str, float]], None]:
    import wandb

    run = wandb.init(
        project=project.root.name,
        name=project.manifest.distill.name,
        dir=str(project.run),
        config=project.manifest.model_dump(mode="json"),
    )
    stack.callback(run.finish)
    return lambda step, values: run.log(values, step=step)


def _trackio(
    project: Project, resumed: Resumed | None, stack: ExitStack
) -> Callable[[int, dict[str, float]], None]:
    import trackio

    trackio.init(
        project=project.root.name,
        name=project.manifest.distill.name,
        config=project.manifest.model_dump(mode="json"),
    )
    stack.callback(trackio.finish)
    return lambda step, values: trackio.log(values, step=step)
