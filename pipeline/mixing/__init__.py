"""From losses per domain to domain weights (the rules), and from weights to a stream of windows (the sampler).

Both are pure arithmetic on numpy arrays; a rule of a user's own is found by its name.
"""

from ddk_pipe.pipeline.mixing.arrays import FloatArray, check_weights
from ddk_pipe.pipeline.mixing.from_manifest import mixing_rule
from ddk_pipe.pipeline.mixing.registry import RULES, InitialDraw, Rule, initial_weights, make_rule
from ddk_pipe.pipeline.mixing.rules import (
    ddk,
    ddk_initial,
    ddk_unsmoothed,
    doremi,
    gap_softmax,
    learnability,
    natural,
    sheared,
    uniform,
)
from ddk_pipe.pipeline.mixing.sampler import DomainSampler, rank_slice

__all__ = [
    "RULES",
    "DomainSampler",
    "FloatArray",
    "InitialDraw",
    "Rule",
    "check_weights",
    "ddk",
    "ddk_initial",
    "ddk_unsmoothed",
    "doremi",
    "gap_softmax",
    "initial_weights",
    "learnability",
    "make_rule",
    "mixing_rule",
    "natural",
    "rank_slice",
    "sheared",
    "uniform",
]
