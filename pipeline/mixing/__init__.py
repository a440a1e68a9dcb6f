"""From losses per domain to domain weights (the rules), and from weights to a stream of windows (the sampler).

Both are pure arithmetic on numpy arrays; a rule of a user's own is found by its name.
"""

from ddk_pipe.pipeline.mixing.rules import (
    RULES,
    FloatArray,
    InitialDraw,
    Rule,
    check_weights,
    ddk_initial,
    initial_weights,
    make_rule,
)
from ddk_pipe.pipeline.mixing.sampler import DomainSampler, rank_slice

__all__ = [
    "RULES",
    "DomainSampler",
    "FloatArray",
    "InitialDraw",
    "Rule",
    "check_weights",
    "ddk_initial",
    "initial_weights",
    "make_rule",
    "rank_slice",
]
