"""What a manifest may say, the project that reads and checks it, and the file of a sweep.

Nothing here loads torch: everything wrong with a manifest is said before anything heavy is imported.
"""

from ddk_pipe.pipeline.manifest.field_reference import STARTER, reference
from ddk_pipe.pipeline.manifest.fields import (
    DOMAIN_NAME,
    MOST_SEQ_LEN,
    MOST_SHARD_WINDOWS,
    Cache,
    Distill,
    Manifest,
    Schedule,
    Student,
    Teacher,
    VllmOptions,
)
from ddk_pipe.pipeline.manifest.project import Project, load_project, recorded_manifest
from ddk_pipe.pipeline.manifest.sweep import Dimension, RunSpec, Search, Sweep, SweepSpec, load_sweep
from ddk_pipe.pipeline.manifest.text import DEFAULT_DATE, Attention, DatasetSource, Domain, Packing, Source
from ddk_pipe.pipeline.manifest.training import check_tail, windows_per_domain, windows_per_step

__all__ = [
    "DEFAULT_DATE",
    "DOMAIN_NAME",
    "MOST_SEQ_LEN",
    "MOST_SHARD_WINDOWS",
    "STARTER",
    "Attention",
    "Cache",
    "DatasetSource",
    "Dimension",
    "Distill",
    "Domain",
    "Manifest",
    "Packing",
    "Project",
    "RunSpec",
    "Schedule",
    "Search",
    "Source",
    "Student",
    "Sweep",
    "SweepSpec",
    "Teacher",
    "VllmOptions",
    "check_tail",
    "load_project",
    "load_sweep",
    "recorded_manifest",
    "reference",
    "windows_per_domain",
    "windows_per_step",
]
