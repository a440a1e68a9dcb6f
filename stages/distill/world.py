"""The processes of one training run: one alone, or those that torchrun started; and the student wrapped for them.

Facts and traps are in facts/infrastructure.md section 3: the loss runs inside the wrapped module's forward, because
only there FSDP2 has the output weight whole; DDP and FSDP2 average gradients over ranks, so a loss that is divided by
the labels of all ranks is multiplied by their number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.stages.common import console
from ddk_pipe.stages.distill.said import meet
from ddk_pipe.stages.distill.students import DistillStudent

T = TypeVar("T")
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine: which GPU is its own
    distributed: bool = False
    saving: Any = None  # gloo group of its own for checkpoints written in the background

    @property
    def leads(self) -> bool:
        """True on the one process that writes files and talks to the user."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """`cuda` is this process's own GPU."""
        return (
            torch.device("cuda", self.local_rank)
            if name == "cuda" and self.distributed
            else torch.device(name)
        )

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 sums over all processes, the same bits on each."""
        if not self.distributed:
            return values
        total = torch.from_numpy(np.array(values, dtype=np.float64))
        dist.all_reduce(total)
        return total.numpy()

    def sum_on_device(self, values: Tensor) -> Tensor:
        """Sums over all processes in the place of `values`, the same bits on each; on a GPU nothing waits for them."""
        if self.distributed:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_leader(self, ask: Callable[[], T]) -> T:
        """What ask() returns on the first process, on all of them; they raise the DdkError that it raises too."""
        answer: T | None = None
        refusal: DdkError | None = None
        if self.leads:
            try:
                answer = ask()
            except DdkError as mistake:
                refusal = mistake
        answer, refusal = self.gather((answer, refusal))[0]
        if refusal is not None:
            raise refusal
        return cast(T, answer)

    def wait(self) -> None:
        """Until every process is here."""
        if self.distributed:
            dist.barrier()


@contextmanager
def join_world() -> Iterator[World]:
    """The world that torchrun names in the environment (RANK, WORLD_SIZE), or this process alone.

    Inside, processes other than the first say nothing. Raises DdkError where work breaks off because another
    process is gone: that one has said why, if it could.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    cuda = torch.cuda.is_available()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "cpu:gloo")
    quiet, console.quiet = console.quiet, rank != 0
    try:
        world = World(rank, size, local_rank, True, dist.new_group(backend="gloo"))
        meet(world.gather(os.urandom(8).hex())[0])
        yield world
    except RuntimeError as problem:
        if not any(words in str(problem) for words in GONE):
            raise
        raise DdkError(
            "distill: another process of this run is gone",
            hint="see above what it said, or if it was killed; the same command continues",
        ) from None
    finally:
        console.quiet = quiet
        if not joined:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Wrapped:
    """A student as the processes of `world` train it; `module` is what to call, `student` what it wraps."""

    student: DistillStudent
    module: nn.Module
    world: World
    sharded: bool

    def last_of(self, micro_batches: int, index: int) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro batch: gradients are exchanged in the last one only."""
        last = index == micro_batches - 1
        if self.sharded:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        if self.world.distributed and not last:
            return self.module.no_sync()  # type: ignore[operator, no-any-return]
        return nullcontext()

    def reshard(self) -> None:
        """Put shards in the place of whole weights. FSDP2 leaves its root's whole after a forward without backward,
        and whole ones are other parameters than those that the optimizer knows."""
        if self.sharded:
            self.module.reshard()  # type: ignore[operator]

    def clip(self, limit: float | None) -> Tensor:
        """Scale the gradients down to norm `limit`; returns their norm before, [] on the device."""
        return whole(torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit or math.inf))

    def weights(self) -> dict[str, Tensor] | None:
        """All weights whole on the CPU of the first process, by the model's own names; every process must ask.

        None where the model holds them whole anyway.
        """
        if not self.sharded:
            return None
        found = {}
        for name, parameter in self.student.lm.named_parameters():
            value = whole(parameter.detach())
            if self.world.leads:
                found[name] = value.cpu()
        return found


def whole(tensor: Tensor) -> Tensor:
    """A shard's whole tensor (FSDP2's DTensor); any other as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def wrap(
    student: DistillStudent,
    world: World,
    *,
    parallel: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Wrapped:
    """DDP or FSDP2 (`parallel`: ddp, fsdp) of a student that is on its device; alone: the student itself.
    FSDP2: or of one on the meta device, for `device`, that is filled afterwards (`sharding.fill`).

    FSDP2: each decoder layer is a unit and all the rest another, in which embedding, final norm and output layer
    stay together, tied or not. Masters and gradients are float32; layers compute in `dtype`.
    """
    if not world.distributed:
        return Wrapped(student, student, world, sharded=False)
    if parallel == "ddp":
        ddp = nn.parallel.DistributedDataParallel(
            student,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,  # else gradients are held twice
        )
        return Wrapped(student, ddp, world, sharded=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    place = device or next(student.parameters()).device
    mesh = init_device_mesh(place.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:  # cast_forward_inputs would round the teacher's log-probabilities
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in student.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    return Wrapped(student, student, world, sharded=True)
