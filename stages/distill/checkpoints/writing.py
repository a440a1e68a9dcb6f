"""Writing the tensors of a checkpoint while training goes on; each returns at once, with what tells of the end."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import async_save

from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.distill.checkpoints.tensor_files import tensor_writer, write_tensors
from ddk_pipe.stages.distill.world import World


def begin_shards(folder: Path, tensors: Mapping[str, Tensor], world: World) -> Future[Any]:
    """Every process writes its own rows of the tensors; done on the first one when all are."""
    if world.leads:
        _make_way(folder)
    world.wait()
    mine = {name: tensor.contiguous() for name, tensor in tensors.items()}
    writer = tensor_writer(folder, mine)
    future = async_save(mine, storage_writer=writer, process_group=world.saving)
    assert isinstance(future, Future)
    return future


def begin_whole(folder: Path, tensors: Mapping[str, Tensor], world: World) -> Future[Any]:
    """The first process writes a copy of the tensors, which it holds in host memory until then; the others have the same
    tensors, and are done."""
    if not world.leads:
        nothing: Future[Any] = Future()
        nothing.set_result(None)
        return nothing
    copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def write() -> None:
        _make_way(folder)
        write_tensors(folder, copies)

    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    try:
        return thread.submit(write)
    finally:
        thread.shutdown(wait=False)


def _make_way(folder: Path) -> None:
    durable.make_folder(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
