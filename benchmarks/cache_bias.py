"""Is the mass of the rest unbiased relative to itself? Decoded over true mass, over 10,000 draws of one distribution.

    PYTHONPATH=benchmarks python benchmarks/cache_bias.py [--json OUT]

`pps` at T = 1. A row is one mass R, one shape of the head and one place of the label: the mean of what the decoded rest
weighs over what it weighs in truth, and the standard error of that. The last rows are of a small tau, where the label's
step of 1/2048 is coarser than the other weights: there the ratio is of the entries just above tau. The file of results
keeps as part `before` what label codes rounded to the nearest gave, and as `bytes` what the demo's cache took with both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Row, report
from torch import Tensor

from ddk_pipe.pipeline.targets import Codec, Context, Plan, Ranks, label_codes, select_logits

DRAWS = 10_000
TAU, SMALL_TAU = 0.02, 1e-4
MASSES = (1e-6, 1e-5, 1e-4, 2.4e-4, 2.5e-4, 1e-3, 0.01, 0.1, 0.3)
HEADS = {"peaked": [1.0], "several": [0.62, 0.3, 0.08], "flat": [1 / 20] * 20}
REST_TOKENS = 60
MOST_ERRORS = 4.0  # standard errors that a mean may be off


def decoded(p: Tensor, label: int, tau: float) -> Tensor:
    """Weights that readers get, float64 [DRAWS, V], of a distribution p float64 [V]."""
    plan = Plan("pps", tau, 8, 50, 50, (1.0,), 0)
    labels = torch.full((DRAWS,), label)
    uniforms = torch.from_numpy(plan.uniforms("bias", DRAWS))
    selected = select_logits(p.log().float().expand(DRAWS, -1), labels, plan, uniforms)
    context = Context(labels.numpy(), label_codes(selected.label_logprobs.numpy(), plan.seed, "bias"), "bias")
    codec = Codec(plan, Ranks.fit(np.arange(len(p))))
    targets = codec.decode(codec.encode(selected.kept[0], context), context)
    weights = torch.zeros(DRAWS, len(p) + 1, dtype=torch.float64)
    weights.scatter_(1, targets.ids.long() % (len(p) + 1), targets.logprobs.double().exp())
    return weights[:, :-1]


def row(name: str, found: Tensor, true: float, **about: float | str) -> Row:
    """found float64 [DRAWS]: the decoded mass of some tokens."""
    error = float(found.std()) / DRAWS**0.5 / true
    return {"name": name, **about, "ratio": float(found.mean()) / true, "standard_error": error}


def rest_rows() -> list[Row]:
    """Every mass, shape and place of the label."""
    rows = []
    for mass in MASSES:
        for shape, head in HEADS.items():
            tail = torch.linspace(1.0, 3.0, REST_TOKENS, dtype=torch.float64)
            p = torch.cat([(1 - mass) * torch.tensor(head, dtype=torch.float64), mass * tail / tail.sum()])
            for place, label in (("head", 0), ("rest", len(p) - 1)):
                found = decoded(p, label, TAU)[:, p < TAU].sum(1)
                name = f"rest {mass:g}, {shape}, label in the {place}"
                rows.append(row(name, found, float(p[p < TAU].sum()), mass=mass, shape=shape, label=place))
    return rows


def small_tau_rows() -> list[Row]:
    """A likely label, three tokens just above tau, and a rest below it."""
    rows = []
    for mass in (5e-5, 2e-4):
        near = SMALL_TAU * torch.tensor([1.05, 1.2, 1.5], dtype=torch.float64)
        rest = torch.full((REST_TOKENS,), mass / REST_TOKENS, dtype=torch.float64)
        p = torch.cat([(1 - mass - near.sum())[None], near, rest])
        for place, label in (("greatest", 0), ("near tau", 1)):
            found = decoded(p, label, SMALL_TAU)[:, 1:4].sum(1)
            name = f"tau {SMALL_TAU:g}, rest {mass:g}, label {place}: entries near tau"
            rows.append(row(name, found, float(near.sum()), mass=mass, shape="small tau", label=place))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = rest_rows() + small_tau_rows()
    worst = max(abs(each["ratio"] - 1) / (each["standard_error"] + 1e-5) for each in rows)
    goal = {"name": "standard errors off, at most", "value": worst, "goal": MOST_ERRORS}
    setup = {"draws": DRAWS, "tau": TAU, "small_tau": SMALL_TAU}
    report(rows, [{**goal, "met": worst <= MOST_ERRORS}], arguments.json, part="after", setup=setup)


if __name__ == "__main__":
    main()
