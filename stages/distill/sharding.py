"""A student in shards (FSDP2) from its start: one process builds it, the others get their rows of it and no more.

The leader draws or reads the first weights and proves them, as for any run; its model is then taken apart. On every
process the student is a skeleton on the meta device, sharded there, and filled row by row from the leader's tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddk_pipe.stages.distill.world import World

Tensors = dict[str, Tensor]


def taken_apart(world: World, build: Callable[[], Any]) -> tuple[Any, Tensors | None]:
    """The model that build() makes on the leader: a skeleton of it on the meta device, and its tensors by name (none
    on the other processes). Of a model whose configuration does not say all of its shape: the model itself, built on
    each process, and None.

    Every process must call it; they raise the DdkError that build() raises on the leader.
    """
    built: list[Any] = []

    def facts() -> tuple[Any, ...]:
        lm = build()
        built.append(lm)
        return type(lm), lm.config, lm.config._attn_implementation, lm.training, _shapes(lm)

    kind, config, attention, training, shapes = world.of_leader(facts)
    bones = _skeleton(kind, config, attention)
    fits = bones is not None and _shapes(bones) == shapes
    if not all(world.gather(fits)) or bones is None:
        return (built[0] if built else build()), None
    bones.train(training)
    if not built:
        return bones, {}
    (lm,) = built
    bones.config, bones.generation_config = lm.config, getattr(lm, "generation_config", None)
    return bones, {name: tensor.detach() for name, tensor in _named(lm).items()}


def fill(module: nn.Module, device: torch.device, world: World, tensors: Tensors, *, prefix: str) -> None:
    """Give a module sharded on the meta device its memory, and its shards of the leader's tensors, which are used up.

    `prefix`: of the module's names before those of the tensors. Parameters are sharded by rows.
    """
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        tensor = tensors.pop(name.removeprefix(prefix), None)
        shard: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
        _scatter_rows(tensor, shard, len(parameter), world)
    buffers = world.of_leader(
        lambda: {name: tensors[name.removeprefix(prefix)] for name, _ in module.named_buffers()}
    )
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


def _scatter_rows(tensor: Tensor | None, shard: Tensor, rows: int, world: World) -> None:
    """`tensor` [rows, ...] on the leader -> `shard` on each process: consecutive rows, as torch.chunk cuts them."""
    each = -(-rows // world.size)
    for rank in range(world.size):
        part = slice(min(rank * each, rows), min((rank + 1) * each, rows))
        if part.start == part.stop:
            continue
        if rank == world.rank:
            assert len(shard) == part.stop - part.start
        if world.leads:
            assert tensor is not None
            if rank == 0:
                shard.copy_(tensor[part])
            else:
                dist.send(tensor[part].to(shard.device).contiguous(), dst=rank)
        elif rank == world.rank:
            dist.recv(shard, src=0)


def _skeleton(kind: Any, config: Any, attention: str | None) -> Any | None:
    """The model of a configuration on the meta device, None where its class cannot be built there."""
    try:
        with torch.device("meta"):
            return kind._from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
            )
    except Exception:  # noqa: BLE001 - code of any model's own
        return None


def _named(lm: Any) -> Tensors:
    return {**dict(lm.named_parameters()), **dict(lm.named_buffers())}


def _shapes(lm: Any) -> list[tuple[str, tuple[int, ...], str, bool]]:
    return [
        (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        for name, tensor in _named(lm).items()
    ]
