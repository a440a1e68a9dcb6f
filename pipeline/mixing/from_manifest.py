"""The mixing rule that a manifest asks for."""

from __future__ import annotations

import numpy as np

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Distill
from ddk_pipe.pipeline.mixing.arrays import FloatArray
from ddk_pipe.pipeline.mixing.registry import Rule, make_rule


def mixing_rule(options: Distill, domains: list[str], sizes: list[int]) -> Rule:
    """The rule of distill.mixing with its options; raises DdkError for one that is unknown or does not fit."""
    return make_rule(
        options.mixing,
        alpha=options.alpha,
        sizes=sizes,
        prior=prior_shares(options, domains, sizes),
        largest_ratio=options.largest_ratio,
        options=options.mixing_options,
    )


def prior_shares(options: Distill, domains: list[str], sizes: list[int]) -> FloatArray | None:
    """distill.prior as shares [domains], None for 1/N; raises DdkError for one that does not fit the domains."""
    prior = options.prior
    if prior == "uniform":
        return None
    if prior == "natural":
        return np.array(sizes, dtype=np.float64) / sum(sizes)
    assert isinstance(prior, dict)
    if set(prior) != set(domains):
        odd = sorted(set(prior) ^ set(domains))
        raise DdkError(
            f"distill.prior: {', '.join(odd)} stands in only one of prior and domains",
            hint=f"give a share for each of {', '.join(domains)}",
        )
    values = np.array([prior[name] for name in domains], dtype=np.float64)
    if not values.sum() > 0:
        raise DdkError("distill.prior: all shares are 0", hint="give at least one domain a share")
    shares: FloatArray = values / values.sum()  # relative shares are as good
    return shares
