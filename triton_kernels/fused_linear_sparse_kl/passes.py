"""The two passes over the vocabulary: one that adds up, one that writes gradients and carries them on."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ddk_pipe.triton_kernels import tuning
from ddk_pipe.triton_kernels.fused_linear_sparse_kl import kernels, launches
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.launches import ALIGNED, GROUP, Launch, Put
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.layer import Layer
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.rows import Rows, TailSums, Targets


def tail_sums(layer: Layer, targets: Targets) -> TailSums:
    """What `tail_lse` writes; where it writes nothing there is -inf, for a label NaN."""
    h, w = layer.hidden, layer.weight
    starts = torch.arange(0, len(w), layer.chunk, dtype=torch.int32, device=h.device)
    every_row = starts.expand(len(h), -1).contiguous()
    first = torch.searchsorted(targets.ids, every_row, out_int32=True).t().contiguous()
    top = torch.empty(first.shape, dtype=torch.float32, device=h.device)
    total, total_t = torch.empty_like(top), torch.empty_like(top)
    z_ids = torch.full_like(targets.log_w, float("-inf"))
    z_label = torch.full_like(targets.log_tail, float("nan"))

    def run(launch: Launch, options: dict[str, Any]) -> None:
        kernels.tail_lse[(triton.cdiv(len(h), launch.rows), len(starts))](
            h,
            w,
            targets.labels,
            targets.ids,
            first,
            z_ids,
            z_label,
            top,
            total,
            total_t,
            len(h),
            len(w),
            h.shape[1],
            targets.ids.shape[1],
            h.stride(0),
            w.stride(0),
            layer.chunk,
            layer.inv_t,
            **options,
        )

    layer.run("tail_lse", run)
    return TailSums(top, total, total if layer.inv_t == 1 else total_t, z_ids, z_label)


def gradients(layer: Layer, targets: Targets, rows: Rows) -> tuple[Tensor, Tensor]:
    """d_hidden [n, d] and d_weight [V, d] in float32, a chunk of the vocabulary after the other."""
    h, w, width = layer.hidden, layer.weight, layer.width
    d_hidden = torch.zeros(len(h), width, dtype=torch.float32, device=h.device)
    d_weight = torch.empty(len(w), width, dtype=torch.float32, device=h.device)
    stride = triton.cdiv(min(layer.chunk, len(w)), ALIGNED) * ALIGNED
    scratch = torch.empty(len(h), stride, dtype=h.dtype, device=h.device)
    for begin in range(0, len(w), layer.chunk):
        end = min(begin + layer.chunk, len(w))
        g = scratch[:, : end - begin]
        write_gradient(g, layer, targets, rows, begin, end)
        d_hidden += _product(g, w[begin:end, :width])
        d_weight[begin:end] = _product(g.t(), h[:, :width])
    return d_hidden, d_weight


def write_gradient(g: Tensor, layer: Layer, targets: Targets, rows: Rows, begin: int, end: int) -> None:
    """g [n, end - begin] becomes the gradient of the logits of the tokens [begin, end)."""
    h, w, one = layer.hidden, layer.weight, layer.inv_t == 1
    scale = rows.ce_scale + rows.kl_scale if one else rows.ce_scale

    def run(launch: Launch, options: dict[str, Any]) -> None:
        tiles = triton.cdiv(len(h), launch.rows) * triton.cdiv(end - begin, launch.columns)
        kernels.chunk_gradient[(tiles,)](
            h,
            w,
            rows.top,
            scale,
            rows.kl_scale,
            g,
            len(h),
            h.shape[1],
            h.stride(0),
            w.stride(0),
            g.stride(0),
            begin,
            end,
            layer.inv_t,
            GROUP=GROUP,
            **options,
        )

    def put(one: Put) -> None:
        kernels.put_ids[(len(h),)](
            g,
            targets.ids,
            rows.at_ids,
            rows.lone_label,
            rows.at_label,
            g.stride(0),
            targets.ids.shape[1],
            begin,
            end,
            BLOCK=one.block,
            num_warps=one.warps,
        )

    layer.run("chunk_gradient", run)
    key = ("put_ids", g.dtype, *tuning.size_class(*targets.ids.shape))
    put(tuning.pick(launches.PUTS, key, lambda: put, h.device))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; 16-bit operands are summed and returned in it."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cpu":  # the interpreter; torch has no such product there
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)
