"""The fused kernels in every dtype, at every temperature, on every shape of operands and chunks."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace

import kernel_cases as common
import torch
from fused_problems import DTYPES, compare, fused, problem, small_tiles
from kernel_cases import Cases, Findings
from torch import Tensor

from ddk_pipe.pipeline.targets import SparseTargets

CASES = case = Cases(small_tiles)


# ---------------------------------------------------------------- every dtype, temperature and k

for _name, _dtype in DTYPES.items():
    for _t in (1.0, 2.0):
        for _k in (1, 12):

            @case(f"{_name} T={_t:g} k={_k}")
            def _(dtype: torch.dtype = _dtype, temperature: float = _t, kept: int = _k) -> Findings:
                return compare(problem(kept=kept), dtype, temperature)


@case("T=0.7, gamma=0")
def _() -> Findings:
    return [*compare(problem(), temperature=0.7), *compare(problem(), temperature=2.0, gamma=0.0)]


@case("shipped launch, float32")
def _() -> Findings:
    return compare(problem(width=40), temperature=2.0, chunk=8192)


@case("shipped launch, float16")
def _() -> Findings:
    return compare(problem(width=72), torch.float16, temperature=2.0, chunk=208)


# ---------------------------------------------------------------- shapes

for _rows, _vocab, _width in ((1, 37, 16), (17, 160, 40), (20, 211, 33), (33, 97, 7)):

    @case(f"N={_rows} V={_vocab} d={_width}")
    def _(rows: int = _rows, vocab: int = _vocab, width: int = _width) -> Findings:
        parts = [problem(vocab, 5, width) for _ in range(math.ceil(rows / 6))]
        index = torch.arange(rows)
        p = replace(
            parts[0],
            hidden=torch.cat([q.hidden for q in parts])[index],
            labels=torch.cat([q.labels for q in parts])[index],
            targets=SparseTargets(
                *(
                    torch.cat([getattr(q.targets, part) for q in parts])[index]
                    for part in ("ids", "logprobs", "tail")
                )
            ),
        )
        return compare(p, temperature=2.0, chunk=80)


for _chunk in (16, 33, 301, 4096):

    @case(f"vocab_chunk={_chunk}")
    def _(chunk: int = _chunk) -> Findings:
        return compare(problem(), temperature=2.0, chunk=chunk)


@case("operands that are not contiguous")
def _() -> Findings:
    p = problem(width=32).rounded(torch.float32)
    want = fused(p)
    wide = torch.full((6, 40), 7.0)
    wide[:, 3:35] = p.hidden
    turned = p.weight.t().contiguous().t()
    sparse = {
        "ids": p.targets.ids.t().contiguous().t(),
        "logprobs": p.targets.logprobs.t().contiguous().t(),
        "tail": torch.stack([p.targets.tail] * 2, 1)[:, 0],
    }
    got = fused(replace(p, hidden=wide[:, 3:35], weight=turned).with_targets(**sparse))
    worst = max(common.relative(a, b) for a, b in zip(got, want, strict=True))
    return [("as if they were", worst, 1e-6)]


@case("row offsets past 2^31 elements")
def _() -> Findings:
    """Row 2 of hidden and of weight. Eight GB of addresses, a few pages of memory."""
    stride, width = 2**30 + 16, 16

    def far(x: Tensor) -> Tensor:
        size = ((len(x) - 1) * stride + width) * 2
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.float16).as_strided(x.shape, (stride, 1)).copy_(x)

    p = problem(vocab=4, kept=1, width=width).rounded(torch.float16).rows(torch.tensor([0, 1, 3]))
    near = fused(p)
    got = fused(replace(p, hidden=far(p.hidden), weight=far(p.weight)))
    return [("as near by", common.wrong(all(torch.equal(a, b) for a, b in zip(got, near, strict=True))), 0.0)]


if __name__ == "__main__":
    CASES.main()
