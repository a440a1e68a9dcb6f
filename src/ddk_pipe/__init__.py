"""ddk-pipe: pay for the teacher once, distil any number of students from its cached predictions.

For loops of one's own: the names in `__all__`, which stay what they are until a release says otherwise a version ahead
(docs/python-api.md). They are imported at their first use: `import ddk_pipe` alone brings no torch.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_pipe.pipeline.cache import CachedWindows, CacheReader, DomainBatches, collate
    from ddk_pipe.pipeline.errors import DdkError
    from ddk_pipe.pipeline.losses import SparseKdLoss, linear_sparse_kd, sparse_kd_reference
    from ddk_pipe.pipeline.manifest import load_project
    from ddk_pipe.pipeline.mixing import RULES, DomainSampler, ddk_initial, initial_weights, make_rule
    from ddk_pipe.pipeline.targets import SparseTargets

__version__ = version("ddk-pipe")
__all__ = [
    "RULES",
    "CacheReader",
    "CachedWindows",
    "DdkError",
    "DomainBatches",
    "DomainSampler",
    "SparseKdLoss",
    "SparseTargets",
    "collate",
    "ddk_initial",
    "initial_weights",
    "linear_sparse_kd",
    "load_project",
    "make_rule",
    "sparse_kd_reference",
]
_HOMES = {
    "cache": ("CacheReader", "CachedWindows", "DomainBatches", "collate"),
    "errors": ("DdkError",),
    "losses": ("SparseKdLoss", "linear_sparse_kd", "sparse_kd_reference"),
    "manifest": ("load_project",),
    "mixing": ("DomainSampler", "RULES", "ddk_initial", "initial_weights", "make_rule"),
    "targets": ("SparseTargets",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ddk_pipe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ddk_pipe.pipeline.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
